"""What a cut would leave of every block, for any method, protection, allocation and sparsity."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from rich.cells import cell_len
from textual.binding import Binding, BindingType

from chanfmt.base.errors import ChanfmtError
from chanfmt.base.text import one_line
from surgery.planning.methods import METHODS
from surgery.planning.sizes import parameters_text
from surgery.planning.what_if import total
from tui.screens.base import BACK_BINDINGS, common_bindings
from tui.screens.ffns import FfnScreen
from tui.session.scenario import HIGHEST, Scenario, answer, kept_curve
from tui.widgets import plots
from tui.widgets.text import percent, wrapped
from tui.widgets.what_if_table import WhatIfTable

if TYPE_CHECKING:
    from surgery.planning.what_if import Left, WhatIf
    from tui.session.load import Snapshot
    from tui.session.place import Opening
    from tui.session.session import Session
    from tui.widgets.lines import Line


class WhatIfScreen(FfnScreen):
    """The numbers of ``surgery plan``, one key away."""

    SCREEN = "what-if"
    TABLE = WhatIfTable
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("x", "method(1)", "method", tooltip="the next method", id="next-method"),
        Binding("X", "method(-1)", "method back", show=False, tooltip="the previous method", id="previous-method"),
        Binding("o", "allocation", "alloc", tooltip="the next allocation", id="allocation"),
        Binding("P", "protection", "protection", tooltip="what is protected", id="protection"),
        Binding("enter", "open", "layer", show=False, tooltip="open the layer", id="open"),
        *common_bindings("what-if"),
        *BACK_BINDINGS,
    ]
    table: WhatIfTable

    def __init__(self, session: Session, opening: Opening) -> None:
        super().__init__(session, WhatIfTable(session.browser.snapshot), opening.ffn)
        self._scenario = Scenario()
        self._snapshot = session.browser.snapshot
        self._answered = self._scenario
        self._what_if: WhatIf | None = None
        self._rows: tuple[Left, ...] = ()
        self._curve: np.ndarray | None = None
        self._why_not = "reading the atlas"
        # An answer with an older generation has been overtaken and is dropped.
        self._generation = 0

    def show_browser(self) -> None:
        self._prepare()

    def show_marks(self) -> None:
        if self._scenario.marked:
            self._prepare()
        super().show_marks()

    # Numbers.

    def _prepare(self) -> None:
        """Ask for the numbers of the scenario, which a thread computes."""
        self._generation += 1
        generation, scenario = self._generation, self._scenario
        snapshot, masks = self.browser.snapshot, self.session.marks.masks
        self.start(
            lambda: answer(scenario, snapshot, masks),
            lambda what_if: self._have(generation, scenario, snapshot, what_if, ""),
            refused=lambda reason: self._have(generation, scenario, snapshot, None, reason),
            group="what-if",
        )

    def _have(self, generation: int, scenario: Scenario, snapshot: Snapshot, what_if: WhatIf | None, refusal: str) -> None:
        if generation != self._generation:
            return
        self._answered, self._snapshot, self._what_if, self._why_not = scenario, snapshot, what_if, refusal
        self._curve = None if what_if is None else kept_curve(what_if)
        self._ask()

    @property
    def _shown(self) -> Scenario:
        """The scenario of the numbers shown: the last one answered, at the sparsity asked for. An answer covers every sparsity."""
        return self._answered.with_percent(self._scenario.percent)

    def _ask(self) -> None:
        """Show what is kept at the sparsity asked for."""
        rows: tuple[Left, ...] = ()
        if self._what_if is not None:
            try:
                rows = self._what_if.at(self._scenario.percent / 100)
            except ChanfmtError as error:
                self._why_not = error.message
            else:
                self._why_not = ""
        record, self._rows = self.record, rows
        self.table.show(self._snapshot, rows, self._snapshot.nearest(record))
        self.paint()

    # Lines.

    def title_texts(self) -> tuple[str, str]:
        shown = self._shown
        right = f"{shown.percent}% cut  what-if"
        settings = f"{shown.method}  {shown.allocation}  protected: {shown.protection_text()}"
        left = f"{self.session.file_name} ▸ {settings}"
        # If there is no room for both, the settings are worth more than the name of the file.
        return left if cell_len(left) + cell_len(right) + 3 <= self.size.width else settings, right

    def headline_text(self, width: int) -> str:
        sizes = None if self._what_if is None or not self._rows else self._what_if.sizes(self._rows)
        if sizes is None:
            return ""
        text = parameters_text(*sizes.parameters)
        for part in sizes.details:
            if cell_len(text) + cell_len(part) + 4 <= width:
                text += f"; {part}"
        return text

    def status_text(self) -> str:
        if self._why_not:
            return one_line(self._why_not)
        whole = total(self._rows)
        share = percent(whole.lp_share if whole.lp_share is not None else float("nan"))
        supernodes = f"super {whole.supernodes_kept:,}/{whole.supernodes:,}"
        if self._is_refused:
            return f"needs --allow-padding: the file would hardly shrink  {supernodes}  LP mass kept {share}"
        return f"model: {whole.channels_kept:,} of {whole.channels:,} ch  {supernodes}  LP mass kept {share}"

    def legend_line(self, width: int) -> Line:
        cells = max(10, width - 62)
        done = round(cells * self._scenario.percent / HIGHEST)
        slider = "━" * max(0, done - 1) + "●" + "─" * (cells - max(1, done))
        return [(f" 0% {slider} {HIGHEST}%  ", ""), ("LP mass is a proxy for loss, not a perplexity", "dim")]

    def panel_lines(self, width: int, height: int) -> list[Line]:
        method = METHODS[self._shown.method]
        lines: list[Line] = [
            [(method.name, "strong")],
            *([(f" {line}", "")] for line in wrapped(method.description, width - 1)),
            *([(f" {line}", "dim")] for line in wrapped(method.source, width - 1)),
        ]
        if self._what_if is not None:
            lines.append([(f" {self._what_if.protected:,} channels protected", "")])
            lines += [[(f" {line}", "")] for text in self._what_if.warnings for line in wrapped(one_line(text), width - 1)]
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

    def comments(self) -> tuple[str, ...]:
        return (self.copy_text().strip(),)

    def copy_text(self) -> str:
        command = self._shown.command(self.session.atlas_name, str(self.session.protect_file), allow_padding=self._is_refused)
        return command + "\n"

    @property
    def _is_refused(self) -> bool:
        """Whether prune would refuse the cut shown, because its file would hardly shrink."""
        return bool(self._rows) and self._what_if is not None and self._what_if.is_refused(self._rows)

    def action_copy(self) -> None:
        super().action_copy()
        if self._shown.marked and any(self.session.marks.unsaved):
            self.say(f"copied; press {self.key('write_marks')} to write the marks that the command reads")

    # Keys.

    def action_step(self, step: int) -> None:
        count = self.table.take_count()
        if count is not None:
            # A number typed before h or l is the new sparsity.
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
        self._scenario = self._scenario.next_protection(marks=any(self.session.marks.counts))
        self._prepare()
