"""The marked channels of every block, and the protect file."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from textual.binding import Binding, BindingType

from chanfmt.base.text import one_line
from surgery.planning.selectors import SYNTAX
from tui.screens.base import BACK_BINDINGS, MEASURE_BINDING, common_bindings
from tui.screens.ffns import FfnScreen
from tui.widgets.protect_table import ProtectTable
from tui.widgets.text import wrapped

if TYPE_CHECKING:
    from tui.session.place import Opening
    from tui.session.session import Session
    from tui.widgets.lines import Line


class ProtectScreen(FfnScreen):
    """The list that ``surgery prune --protect`` would get."""

    SCREEN = "protect"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "layer", tooltip="open the layer", id="open"),
        Binding("x", "remove", "remove", tooltip="unmark the whole layer", id="unmark-layer"),
        Binding("plus", "add", "add", tooltip="mark channels by rule", id="mark-by-rule"),
        Binding("minus", "take", "take", show=False, tooltip="unmark channels by rule", id="unmark-by-rule"),
        MEASURE_BINDING,
        *common_bindings("protect"),
        Binding("U", "discard", "discard", show=False, tooltip="discard all unsaved marks", id="discard-marks"),
        Binding("o", "load_marks", "load", show=False, tooltip="read the protect file again", id="load-marks"),
        *BACK_BINDINGS,
    ]
    table: ProtectTable

    def __init__(self, session: Session, opening: Opening) -> None:
        super().__init__(session, ProtectTable(session.browser.snapshot), opening.ffn)
        self._refused_rule = ""

    def show_browser(self) -> None:
        self.table.show(self.browser.snapshot, self.session.marks, self.ffn)

    def show_marks(self) -> None:
        self.show_browser()
        self.paint()

    def title_texts(self) -> tuple[str, str]:
        counts = self._counts()
        layers = sum(1 for count in counts if count)
        return (
            f"{self.session.file_name} ▸ protect list   {sum(counts):,} channels in {layers} of {len(counts)} FFNs",
            "protect",
        )

    def status_text(self) -> str:
        return f"{self._place_name()}: {self._counts()[self.table.place]:,} channels"

    def _counts(self) -> list[int]:
        """Number of marked channels of every block."""
        counts = self.session.marks.counts
        return [sum(counts[ffn] for ffn in block) for block in self.browser.snapshot.blocks]

    def _place_name(self) -> str:
        snapshot = self.browser.snapshot
        return replace(snapshot.ffns[self.ffn], expert=None).name(with_stack=snapshot.several_stacks)

    def legend_line(self, width: int) -> Line:
        added, removed = self.session.marks.unsaved
        state = f"+{added:,} -{removed:,} unsaved" if added or removed else "no unsaved marks"
        return [(f" {one_line(self.session.protect_file.name)}: {state}", "dim")]

    def panel_lines(self, width: int, height: int) -> list[Line]:
        marks = self.session.marks
        lines: list[Line] = [[("changes, newest first", "strong")]]
        lines += [[(f" {'+' if change.on else '-'} {change.sentence} ({change.count:,})", "")] for change in reversed(marks.done)]
        if not marks.done:
            lines.append([(f" none: mark channels in a layer, or by rule with {self.key('add')}", "dim")])
        command: list[Line] = [[(f" {line}", "")] for line in wrapped(self._command(), width - 1)]
        return [*lines[: max(1, height - 2 - len(command))], [], [(f"{self.key('copy')} copies this command", "dim")], *command]

    def _command(self) -> str:
        path = self.session.protect_file
        return shlex.join(["surgery", "prune", self.session.atlas_name, "--protect", str(path), "--sparsity", "0.5"])

    def copy_text(self) -> str:
        return self._command() + "\n"

    def action_remove(self) -> None:
        marks = self.session.marks
        marked = {ffn: np.flatnonzero(marks.of(ffn)) for ffn in self.table.span}
        self.session.mark(marked, f"all of {self._place_name()}", on=False)

    def action_discard(self) -> None:
        self.session.marking.discard()

    def action_load_marks(self) -> None:
        self.session.marking.load()

    def action_add(self) -> None:
        self.ask(self.key("add"), SYNTAX, lambda selector: self._rule(selector, on=True), self._refused_rule)

    def action_take(self) -> None:
        self.ask(self.key("take"), SYNTAX, lambda selector: self._rule(selector, on=False), self._refused_rule)

    def _rule(self, selector: str, *, on: bool) -> None:
        def refused(reason: str) -> None:
            # The next question starts with the rule, so that the user can correct it.
            self._refused_rule = selector
            self.session.say(reason)

        self._refused_rule = ""
        if selector:
            self.session.marking.mark_rule(selector, on=on, refused=refused)
