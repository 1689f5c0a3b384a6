"""The overview's table: one row per FFN, with a heat strip."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.segment import Segment

from tui import view
from tui.text import bar, count, number, percent
from tui.widgets.heat_strip import HeatStrip
from tui.widgets.line_table import Column, LineTable

if TYPE_CHECKING:
    from rich.style import Style

    from tui.model import Browser

MIN_STRIP = 10
GAP = 2
"""Cells left of the strip; one more is free right of it."""


class LayerTable(LineTable):
    """FFNs in the order asked for; ``order`` maps rows to FFNs."""

    def __init__(self, browser: Browser, ramp: tuple[str, ...]) -> None:
        super().__init__(sort_key="layer", descending=False, marked="mass")
        self.browser = browser
        self.heat = HeatStrip(ramp)
        self.order = np.arange(len(browser.snapshot.ffns))
        self._strips: dict[tuple[int, int, bool], np.ndarray] = {}

    @property
    def ffn(self) -> int:
        """The FFN under the cursor."""
        return int(self.order[self.cursor])

    def show(self, browser: Browser, ffn: int) -> None:
        """Show ``browser``, sorted as before, with the cursor on ``ffn``."""
        self.browser = browser
        self._strips.clear()
        self.layout_columns()
        self.sort(ffn)

    def sort(self, ffn: int | None = None) -> None:
        """Put the rows in order and the cursor on ``ffn``, or else on top."""
        self.order = view.order_by(self._sort_values(), descending=self.descending)
        self.set_rows(len(self.order), 0 if ffn is None else int(np.flatnonzero(self.order == ffn)[0]))

    def set_ramp(self, ramp: tuple[str, ...]) -> None:
        """Paint the strips in other colours."""
        self.heat = HeatStrip(ramp)
        self._strips.clear()
        self.refresh()

    def layout_columns(self) -> None:
        """Choose columns for the width."""
        wide = self.row_width >= 90
        stacks = self.browser.snapshot.labels
        columns = [
            Column("layer", "layer", 6),
            *([Column("stack", "stack", max(6, *map(len, stacks)))] if len(stacks) > 1 else []),
            Column("mass", "mass", 8),
            Column("top", self.browser.top_heading, 14 if not wide else 20),
            Column("effective", "n_eff", 6 if not wide else 8),
        ]
        if wide:
            columns += [Column("super", "super", 6), Column("halo", "halo", 6)]
        self.set_columns(tuple(columns), 1)

    def on_resize(self) -> None:
        self.layout_columns()
        super().on_resize()

    def cells(self, row: int) -> list[tuple[str, str]]:
        ffn = int(self.order[row])
        summary = self.browser.summaries[ffn]
        measured = summary.concentration
        texts = {
            "layer": str(self.browser.snapshot.ffns[ffn].layer_index),
            "stack": self.browser.snapshot.ffns[ffn].stack,
            "mass": number(measured.mass),
            "effective": count(measured.effective_channels),
            "super": f"{summary.supernodes:,}",
            "halo": f"{summary.halo:,}",
        }
        return [(texts.get(column.key) or self._top(column, measured.top_share), "") for column in self.columns]

    def _top(self, column: Column, share: float) -> str:
        return f"{percent(share):>6} {bar(share, column.width - 7)}"

    def tail(self, row: int, width: int, base: Style) -> list[Segment]:
        cells = width - GAP - 1
        if cells < MIN_STRIP:
            return []
        ffn = int(self.order[row])
        key = (ffn, cells, self.browser.log_axis)
        if key not in self._strips:
            samples = cells * self.heat.samples_per_cell
            self._strips[key] = self.browser.strip(ffn, samples, self.heat.steps)
        return [Segment(" " * GAP, base), *self.heat.segments(self._strips[key], self.style(""))]

    def tail_heading(self, width: int) -> str:
        cells = width - GAP - 1
        if cells < MIN_STRIP:
            return ""
        widths = {ffn.n_channels for ffn in self.browser.snapshot.ffns}
        last = f"{max(widths):,}" if len(widths) == 1 else "all"
        log = self.browser.log_axis
        first = "1" if log else "0"
        if not log and len(widths) == 1:
            last = f"{max(widths) - 1:,}"
        room = cells - len(first) - len(last) - 2
        names = (f"channels by {self.browser.heading} rank, log", f"by {self.browser.heading} rank, log", "log rank")
        if not log:
            names = ("channels by index", "by index", "index")
        name = next((f" {name} " for name in names if len(name) + 4 <= room), "")
        return f"{'':{GAP}}{first} {name:─^{max(0, room)}} {last}"

    def _sort_values(self) -> np.ndarray:
        snapshot, summaries = self.browser.snapshot, self.browser.summaries
        if self.sort_key == "layer":
            return np.array([ffn.layer_index for ffn in snapshot.ffns])
        if self.sort_key == "stack":
            names = sorted(snapshot.labels)
            return np.array([names.index(ffn.stack) for ffn in snapshot.ffns])
        if self.sort_key in ("super", "halo"):
            return np.array([item.supernodes if self.sort_key == "super" else item.halo for item in summaries])
        field = {"mass": "mass", "top": "top_share", "effective": "effective_channels"}[self.sort_key]
        return np.array([getattr(item.concentration, field) for item in summaries])
