"""The marked channels of every FFN, and the protect file they go to."""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from textual import work
from textual.binding import Binding, BindingType

from chanfmt.base.errors import ChanfmtError
from chanfmt.base.text import printable
from surgery.planning.selectors import SYNTAX
from tui.screens.base import BACK_BINDING, COMMON_BINDINGS
from tui.screens.ffns import FfnScreen
from tui.session.protect import selected
from tui.widgets.protect_table import ProtectTable

if TYPE_CHECKING:
    from tui.session.model import Browser
    from tui.widgets.lines import Line


class ProtectScreen(FfnScreen):
    """What ``surgery prune --protect`` would be told."""

    SCREEN = "protect"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "layer", tooltip="open the layer"),
        Binding("x", "remove", "remove", tooltip="unmark all channels of the layer"),
        Binding("plus", "add", "add", tooltip="mark by rule, as after surgery prune --protect"),
        Binding("minus", "take", "take", show=False, tooltip="unmark by rule"),
        *(item for item in COMMON_BINDINGS if item.key != "p"),
        Binding("U", "discard", "discard", show=False, tooltip="undo everything that was not written"),
        Binding("o", "app.load_marks", "load", show=False, tooltip="read the protect file again"),
        BACK_BINDING,
    ]
    table: ProtectTable

    def __init__(self, browser: Browser, ffn: int) -> None:
        super().__init__(ProtectTable(browser.snapshot), ffn)

    def show_browser(self) -> None:
        self.table.show(self.browser.snapshot, self.atlas_app.marks, self.ffn)

    def show_marks(self) -> None:
        self.show_browser()
        self.paint()

    def title_texts(self) -> tuple[str, str]:
        counts = self._counts()
        layers = sum(1 for count in counts if count)
        return (
            f"{self.atlas_app.file_name} ▸ protect list   {sum(counts):,} channels in {layers} of {len(counts)} FFNs",
            "protect",
        )

    def status_text(self) -> str:
        return f"{self._place_name()}: {self._counts()[self.table.place]:,} channels"

    def _counts(self) -> list[int]:
        """Marked channels of every block."""
        counts = self.atlas_app.marks.counts
        return [sum(counts[ffn] for ffn in block) for block in self.browser.snapshot.blocks]

    def _place_name(self) -> str:
        snapshot = self.browser.snapshot
        return replace(snapshot.ffns[self.ffn], expert=None).name(with_stack=snapshot.several_stacks)

    def legend_line(self, width: int) -> Line:
        added, removed = self.atlas_app.marks.unsaved
        state = f"+{added:,} -{removed:,} not written" if added or removed else "as written"
        return [(f" {printable(self.atlas_app.protect_file.name)}: {state}", "dim")]

    def panel_lines(self, width: int, height: int) -> list[Line]:
        marks = self.atlas_app.marks
        lines: list[Line] = [[("changes, the last first", "strong")]]
        lines += [[(f" {'+' if change.on else '-'} {change.sentence} ({change.count:,})", "")] for change in reversed(marks.done)]
        if not marks.done:
            lines.append([(" none: mark channels with ␣ in a layer, or with +", "dim")])
        return [*lines[: height - 3], [], [("y copies", "dim")], [(self._command(), "")]]

    def _command(self) -> str:
        path = self.atlas_app.protect_file
        return shlex.join(["surgery", "prune", self.atlas_app.atlas_name, "--protect", str(path), "--sparsity", "0.5"])

    def copy_text(self) -> str:
        return self._command() + "\n"

    def action_remove(self) -> None:
        marks = self.atlas_app.marks
        marked = {ffn: np.flatnonzero(marks.of(ffn)) for ffn in self.table.span}
        self.atlas_app.mark(marked, f"all of {self._place_name()}", on=False)

    def action_discard(self) -> None:
        self.atlas_app.restore_marks()

    def action_add(self) -> None:
        self.ask("+", SYNTAX, partial(self._rule, on=True))

    def action_take(self) -> None:
        self.ask("-", SYNTAX, partial(self._rule, on=False))

    def _rule(self, selector: str, *, on: bool) -> None:
        if selector:
            self._select(selector, on=on)

    @work(thread=True, exclusive=True, group="select")
    def _select(self, selector: str, *, on: bool) -> None:
        app = self.atlas_app
        try:
            channels = selected(selector, app.browser.snapshot)
        except ChanfmtError as error:
            app.call_from_thread(self.say, printable(error.message))
        else:
            app.call_from_thread(app.mark, channels, printable(selector), on=on)
