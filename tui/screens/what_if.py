"""What a cut would leave of every FFN, for any method, protection, allocation and sparsity."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from textual import work
from textual.binding import Binding, BindingType

from chanfmt.base.errors import ChanfmtError
from chanfmt.base.text import printable
from surgery.planning.methods import METHODS
from surgery.planning.what_if import WhatIf, total
from tui.screens.base import BACK_BINDING, COMMON_BINDINGS
from tui.screens.ffns import FfnScreen
from tui.session.load import reopened
from tui.session.protect import to_blocks
from tui.session.scenario import HIGHEST, Scenario
from tui.widgets import plots
from tui.widgets.text import percent
from tui.widgets.what_if_table import WhatIfTable

if TYPE_CHECKING:
    from surgery.planning.what_if import Left
    from tui.session.load import Snapshot
    from tui.session.model import Browser
    from tui.widgets.lines import Line


class WhatIfScreen(FfnScreen):
    """The numbers of ``surgery plan``, a key each."""

    SCREEN = "what-if"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("x", "method(1)", "method", tooltip="the next method"),
        Binding("X", "method(-1)", "method back", show=False, tooltip="the method before"),
        Binding("o", "allocation", "alloc", tooltip="allocation: uniform or global"),
        Binding("P", "protection", "protection", tooltip="what is protected"),
        Binding("enter", "open", "layer", show=False, tooltip="open the layer"),
        *(item for item in COMMON_BINDINGS if item.key != "w"),
        BACK_BINDING,
    ]
    table: WhatIfTable

    def __init__(self, browser: Browser, ffn: int) -> None:
        super().__init__(WhatIfTable(browser.snapshot), ffn)
        self._scenario = Scenario()
        self._snapshot = browser.snapshot
        self._answered = self._scenario
        self._what_if: WhatIf | None = None
        self._rows: tuple[Left, ...] = ()
        self._curve: np.ndarray | None = None
        self._refusal = "reading the atlas"
        self._generation = 0

    def show_browser(self) -> None:
        self._prepare()

    def show_marks(self) -> None:
        if self._scenario.marked:
            self._prepare()
        super().show_marks()

    # Numbers.

    def _prepare(self) -> None:
        """Score and sort what the scenario asks for, in a thread."""
        self._generation += 1
        self._read(self._generation, self._scenario, self.browser.snapshot, self.atlas_app.marks.masks)

    @work(thread=True, exclusive=True, group="what-if")
    def _read(self, generation: int, scenario: Scenario, snapshot: Snapshot, marks: dict[int, np.ndarray]) -> None:
        app = self.atlas_app
        what_if, refusal = None, ""
        try:
            with reopened(snapshot) as atlas:
                what_if = WhatIf(atlas, scenario.options, to_blocks(marks, atlas) if scenario.marked else None)
        except ChanfmtError as error:
            refusal = error.message
        app.call_from_thread(self._have, generation, scenario, snapshot, what_if, refusal)

    def _have(self, generation: int, scenario: Scenario, snapshot: Snapshot, what_if: WhatIf | None, refusal: str) -> None:
        if generation != self._generation:
            return
        self._answered, self._snapshot, self._what_if, self._refusal = scenario, snapshot, what_if, refusal
        self._curve = None if what_if is None else _curve(what_if)
        self._ask()

    @property
    def _shown(self) -> Scenario:
        """What the numbers are of, until there are those of the scenario that is asked for; any has all sparsities."""
        return self._answered.with_percent(self._scenario.percent)

    def _ask(self) -> None:
        """Show what stays at the scenario's sparsity."""
        rows: tuple[Left, ...] = ()
        if self._what_if is not None:
            try:
                rows = self._what_if.at(self._scenario.percent / 100)
            except ChanfmtError as error:
                self._refusal = error.message
            else:
                self._refusal = ""
        record, self._rows = self.record, rows
        self.table.show(self._snapshot, rows, self._snapshot.nearest(record))
        self.paint()

    # Lines.

    def title_texts(self) -> tuple[str, str]:
        shown = self._shown
        right = f"{shown.percent}% cut  what-if"
        settings = f"{shown.method}  {shown.allocation}  protected: {shown.protection_text()}"
        left = f"{self.atlas_app.file_name} ▸ {settings}"
        # The settings are what the numbers are of; there may be no room for the name before them.
        return left if len(left) + len(right) + 3 <= self.size.width else settings, right

    def status_text(self) -> str:
        if self._refusal:
            return printable(self._refusal)
        whole = total(self._rows)
        return (
            f"model: {whole.channels_kept:,} of {whole.channels:,} ch  super {whole.supernodes_kept:,}/{whole.supernodes:,}  "
            f"LP mass kept {percent(whole.lp_share if whole.lp_share is not None else float('nan'))}"
        )

    def legend_line(self, width: int) -> Line:
        cells = max(10, width - 62)
        done = round(cells * self._scenario.percent / HIGHEST)
        slider = "━" * max(0, done - 1) + "●" + "─" * (cells - max(1, done))
        return [(f" 0% {slider} {HIGHEST}%  ", ""), ("LP mass is a proxy for loss, not a perplexity", "dim")]

    def panel_lines(self, width: int, height: int) -> list[Line]:
        method = METHODS[self._shown.method]
        lines: list[Line] = [
            [(method.name, "strong"), (f"  {method.description}", "")],
            [(f" {method.source}", "dim")],
        ]
        if self._what_if is not None:
            lines.append([(f" {self._what_if.protected:,} channels protected", "")])
            lines += [[(f" {printable(text)}", "")] for text in self._what_if.warnings]
        if self._curve is not None and width > 20 and height > 14:
            cells, rows = width - 8, min(14, height - len(lines) - 6)
            at = np.clip(np.round(np.linspace(1, HIGHEST, 2 * cells)).astype(int), 1, HIGHEST) - 1
            drawn = plots.braille_curve(self._curve[at], rows)
            names = {0: "100%", rows // 2: "50%", rows - 1: "0%"}
            here = round((self._scenario.percent - 1) / (HIGHEST - 1) * (cells - 1))
            lines += [
                [],
                [("LP mass kept by sparsity", "dim")],
                *([(f"{names.get(row, ''):>5}┤", "dim"), (text, "")] for row, text in enumerate(drawn)),
                [("     └" + "─" * here + "▲" + "─" * (cells - here - 1), "dim")],
                [(f"      1%{f'{HIGHEST}%':>{cells - 2}}", "dim")],
            ]
        return lines

    def copy_text(self) -> str:
        return self._shown.command(self.atlas_app.atlas_name, str(self.atlas_app.protect_file)) + "\n"

    def action_copy(self) -> None:
        super().action_copy()
        if self._shown.marked and any(self.atlas_app.marks.unsaved):
            self.say("copied; W writes the marks that it names")

    # Keys.

    def action_step(self, step: int) -> None:
        count = self.table.take_count()
        if count is not None:
            # A number before h or l is the sparsity itself.
            self._scenario = self._scenario.with_percent(count)
        else:
            self._scenario = self._scenario.with_percent(self._scenario.percent + step)
        self._ask()

    def action_method(self, step: int) -> None:
        self._scenario = self._scenario.next_method(step)
        self._prepare()

    def action_allocation(self) -> None:
        self._scenario = self._scenario.next_allocation()
        self._prepare()

    def action_protection(self) -> None:
        self._scenario = self._scenario.next_protection(marks=any(self.atlas_app.marks.counts))
        self._prepare()


def _curve(what_if: WhatIf) -> np.ndarray:
    """Share of the model's LP that stays at 1% to `HIGHEST`%, (HIGHEST,); NaN where the cut is refused."""
    shares = np.full(HIGHEST, np.nan)
    for percent_cut in range(1, HIGHEST + 1):
        try:
            share = total(what_if.at(percent_cut / 100)).lp_share
        except ChanfmtError:
            continue
        shares[percent_cut - 1] = np.nan if share is None else share
    return shares
