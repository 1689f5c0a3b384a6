"""What the screens with a row per FFN, or per expert, have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tui.screens.base import BrowserScreen
from tui.session import view

if TYPE_CHECKING:
    import numpy as np

    from tui.session.load import Ffn
    from tui.widgets.ffn_table import FfnTable


class FfnScreen(BrowserScreen):
    """A table of FFNs: finds by layer, stack, module or expert, and opens what is under the cursor."""

    FIND_HINT = "layer number, or part of a stack or module name"
    table: FfnTable

    def __init__(self, table: FfnTable, ffn: int = 0) -> None:
        super().__init__(table)
        self._last = table.snapshot.ffns[ffn]

    @property
    def record(self) -> Ffn:
        """The FFN that the cursor is on, or was on when there were rows."""
        if self.table.row_count:
            self._last = self.table.snapshot.ffns[self.table.span[0]]
        return self._last

    @property
    def ffn(self) -> int:
        # The table may show another atlas than the app's, or what was read of it before.
        return self.browser.snapshot.nearest(self.record)

    @property
    def span(self) -> range:
        return super().span if self.table.of_experts else self.browser.snapshot.block_around(self.ffn)

    def show_ffn(self, ffn: int) -> None:
        self.table.show_ffn(self.table.snapshot.nearest(self.browser.snapshot.ffns[ffn]))

    def matches(self, query: str) -> np.ndarray:
        table = self.table
        return view.match_spans(table.snapshot, table.spans, query, of_experts=table.of_experts)[table.order]

    def action_open(self) -> None:
        if self.table.row_count:
            self.atlas_app.open_span(self.span)
