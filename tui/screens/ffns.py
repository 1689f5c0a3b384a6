"""What the screens with a row per FFN, or per expert, have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tui import view
from tui.screens.base import BrowserScreen

if TYPE_CHECKING:
    import numpy as np

    from tui.widgets.ffn_table import FfnTable


class FfnScreen(BrowserScreen):
    """A table of FFNs: finds by layer, stack, module or expert, and opens what is under the cursor."""

    FIND_HINT = "layer number, or part of a stack or module name"
    table: FfnTable

    def __init__(self, table: FfnTable, ffn: int = 0) -> None:
        super().__init__(table)
        self._first = ffn

    @property
    def ffn(self) -> int:
        # A table may have no rows yet, and the file fewer FFNs than before.
        if self.table.row_count:
            self._first = self.table.span[0]
        return min(self._first, len(self.browser.snapshot.ffns) - 1)

    def show_ffn(self, ffn: int) -> None:
        self.table.show_ffn(ffn)

    def matches(self, query: str) -> np.ndarray:
        table = self.table
        return view.match_spans(table.snapshot, table.spans, query, of_experts=table.of_experts)[table.order]

    def action_open(self) -> None:
        if self.table.row_count:
            self.atlas_app.open_span(self.table.span)
