"""The table of blocks, or of the experts of one block, with a heat strip."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.cells import cell_len
from rich.segment import Segment

from chanfmt.algebra.labels import supernode_count
from tui.widgets.ffn_table import FfnTable
from tui.widgets.heat_strip import HeatStrip
from tui.widgets.line_table import Column
from tui.widgets.text import bar, count, number, percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.style import Style

    from tui.session.model import Browser

MIN_STRIP = 10
"""Fewest cells for which a strip is drawn."""
GAP = 2
"""Empty cells to the left of the strip. One more cell is empty to its right."""


class LayerTable(FfnTable):
    """A row per span of FFNs: the blocks of the model, or with ``of_experts`` the experts of one block.

    Args:
        ramp: As for `HeatStrip`.
    """

    def __init__(self, browser: Browser, spans: Sequence[range], ramp: tuple[str, ...], *, of_experts: bool = False) -> None:
        super().__init__(browser.snapshot, spans, marked="mass", of_experts=of_experts)
        self.browser = browser
        self.heat = HeatStrip(ramp)
        self._strips: dict[tuple[range, int, bool], np.ndarray] = {}

    def show(self, browser: Browser, spans: Sequence[range], ffn: int) -> None:
        """Show ``spans`` of ``browser`` in the same order as before, with the cursor on ``ffn``."""
        self.browser, self.snapshot, self.spans = browser, browser.snapshot, tuple(spans)
        self._strips.clear()
        self.layout_columns()
        self.sort(ffn)

    def set_ramp(self, ramp: tuple[str, ...]) -> None:
        """Paint the strips in the colours ``ramp``."""
        self.heat = HeatStrip(ramp)
        self._strips.clear()
        self.refresh()

    def layout_columns(self) -> None:
        wide = self.row_width >= 90
        columns = self.name_columns()
        if self.of_experts:
            columns.append(Column("tokens", "tokens", 9))
        columns += [
            Column("mass", "mass", 8),
            Column("top", self.browser.top_heading, 14 if not wide else 20, at_left=True, scale="100%"),
            Column("effective", "n_eff", 6 if not wide else 8),
        ]
        if wide:
            columns += [Column("super", "super", 6), Column("halo", "halo", 6)]
        self.set_columns(tuple(columns), 1)

    def cells(self, row: int, columns: Sequence[Column]) -> list[tuple[str, str]]:
        place = int(self.order[row])
        summary = self.browser.summary(self.spans[place])
        measured = summary.concentration
        tokens = self.snapshot.tokens_of(self.spans[place][0])
        texts = self.name_texts(place) | {
            "tokens": "-" if tokens is None else f"{tokens:,}",
            "mass": number(measured.mass),
            "effective": count(measured.effective_channels),
            "super": f"{summary.supernodes:,}",
            "halo": f"{summary.halo:,}",
        }
        return [(texts.get(column.key) or self._top(column, measured.top_share), "") for column in columns]

    def _top(self, column: Column, share: float) -> str:
        return f"{percent(share):>6} {bar(share, column.width - 7)}"

    def tail(self, row: int, width: int, base: Style) -> list[Segment]:
        cells = width - GAP - 1
        if cells < MIN_STRIP:
            return []
        span = self.spans[int(self.order[row])]
        key = (span, cells, self.browser.log_axis)
        if key not in self._strips:
            samples = self.heat.samples_per_cell
            levels = self.browser.strip(span, cells * samples, self.heat.steps)
            # The empty cell after the strip is a part of the strip, so that it needs no style of its own.
            self._strips[key] = np.pad(levels, (0, samples))
        return [Segment(" " * GAP, base), *self.heat.segments(self._strips[key], self.style(""))]

    def tail_heading(self, width: int) -> str:
        cells = width - GAP - 1
        if cells < MIN_STRIP:
            return ""
        widths = {sum(self.snapshot.ffns[ffn].n_channels for ffn in span) for span in self.spans}
        log, only = self.browser.log_axis, max(widths) if len(widths) == 1 else None
        last = "all" if only is None else str(only if log else only - 1)
        first = "1" if log else "0"
        free = [range(len(first) + 1, cells - len(last) - 1)]
        line = list(f"{first} {'─' * len(free[0])} {last}")
        boundary = f"┼{100 * self.snapshot.rho:g}%"
        at = self._boundary(only, cells) if log and only is not None else 0
        if free[0].start < at < free[0].stop - len(boundary):
            line[at : at + len(boundary)] = boundary
            free = [range(free[0].start, at), range(at + len(boundary), free[0].stop)]
        names = (f"channels by {self.browser.heading} rank, log", f"by {self.browser.heading} rank, log", "log rank")
        if not log:
            names = ("channels by index", "by index", "index")
        room = max(free, key=len)
        name = next((f" {name} " for name in names if cell_len(name) + 4 <= len(room)), "")
        start = room.start + (len(room) - cell_len(name)) // 2
        # A name may have characters of two cells.
        return f"{'':{GAP}}{''.join(line[:start])}{name}{''.join(line[start + cell_len(name) :])}"

    def _boundary(self, channels: int, cells: int) -> int:
        """The cell of the strip in which the top channels end, on a log axis."""
        experts = max(len(span) for span in self.spans)
        top = experts * supernode_count(channels // experts, self.snapshot.rho)
        return int(cells * np.log(top + 1) / np.log(channels + 1))

    def shown(self) -> dict[str, np.ndarray]:
        # A narrow table does not show these two columns.
        return super().shown() | {key: self.place_values(key)[self.order] for key in ("super", "halo")}

    def place_values(self, key: str) -> np.ndarray:
        summaries = [self.browser.summary(span) for span in self.spans]
        if key == "tokens":
            return np.array([self.snapshot.tokens_of(span[0]) or 0 for span in self.spans])
        if key in ("super", "halo"):
            return np.array([item.supernodes if key == "super" else item.halo for item in summaries])
        field = {"mass": "mass", "top": "top_share", "effective": "effective_channels"}[key]
        return np.array([getattr(item.concentration, field) for item in summaries])
