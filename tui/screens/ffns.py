"""What the screens with a row per FFN, block or expert have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tui.screens.base import BrowserScreen
from tui.session import view

if TYPE_CHECKING:
    import numpy as np

    from tui.session.load import Ffn
    from tui.session.session import Session
    from tui.widgets.ffn_table import FfnTable


class FfnScreen(BrowserScreen):
    """A table of FFNs. A search finds a layer, stack, module or expert; opening a row opens its experts or its channels.

    Args:
        ffn: The FFN that the cursor starts on.
    """

    FIND_HINT = "layer number, or part of the name of a stack or module"
    table: FfnTable

    def __init__(self, session: Session, table: FfnTable, ffn: int) -> None:
        super().__init__(session, table)
        self._last = table.snapshot.ffns[ffn]

    @property
    def record(self) -> Ffn:
        """The FFN that the cursor is on, or was on when the table last had rows."""
        if self.table.row_count:
            self._last = self.table.snapshot.ffns[self.table.span[0]]
        return self._last

    @property
    def ffn(self) -> int:
        # The table may show the other atlas of the session, or an earlier reading of this one.
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
        self.table.to_counted_row()
        if self.table.row_count:
            span = self.span
            self.open("layer" if len(span) == 1 else "experts", ffn=span[0])
