"""What the screens with a row per channel have in common: marking rows for protection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from textual.binding import Binding

from tui.screens.base import MEASURE_BINDING, BrowserScreen

if TYPE_CHECKING:
    from tui.session.session import Session
    from tui.widgets.channel_table import ChannelTable
    from tui.widgets.query_table import QueryTable

MARK_BINDINGS: list[Binding] = [
    Binding("space", "mark", "mark", tooltip="mark or unmark", id="mark"),
    Binding("V", "range", "range", show=False, tooltip="start a range to mark", id="mark-range"),
    Binding("a", "mark_all(True)", "all", show=False, tooltip="mark all channels shown", id="mark-all"),
    Binding("A", "mark_all(False)", "none", show=False, tooltip="unmark all channels shown", id="unmark-all"),
    MEASURE_BINDING,
]


class MarkingScreen(BrowserScreen):
    """Channels that can be marked one by one, as a range, or all. Subclasses say which channels the rows are."""

    table: ChannelTable | QueryTable

    def __init__(self, session: Session, table: ChannelTable | QueryTable) -> None:
        super().__init__(session, table)
        self._range: tuple[int, np.ndarray] | None = None

    # What subclasses define.

    def channels_of(self, rows: np.ndarray) -> dict[int, np.ndarray]:
        """FFN to the ascending ids of the channels in ``rows``, int64 (n,)."""
        raise NotImplementedError

    def every_channel(self) -> dict[int, np.ndarray]:
        """FFN to the ascending ids of all channels that the filter chooses."""
        raise NotImplementedError

    @property
    def channel_text(self) -> str:
        """The channel under the cursor, in words."""
        raise NotImplementedError

    def step_channel(self, step: int) -> None:
        """Move the cursor by ``step`` rows."""
        self.table.action_move(step)

    # Marks.

    def status_text(self) -> str:
        start = self._range_start
        return ("" if start is None else f"range of {abs(self.table.cursor - start) + 1:,}  ") + self.channel_text

    @property
    def in_range(self) -> bool:
        """Whether the user has started a range."""
        return self._range_start is not None

    @property
    def _range_start(self) -> int | None:
        """The row at which a range starts, or None."""
        # A range ends when the rows change: by sorting, by a filter, by another layer.
        return self._range[0] if self._range is not None and self._range[1] is self.table.order else None

    def action_range(self) -> None:
        self._range = None if self.in_range else (self.table.cursor, self.table.order)
        self.paint_status()

    def action_mark(self) -> None:
        start = self._range_start
        self._range = None
        self._mark_rows(self.table.cursor if start is None else start)

    def mark_channel(self) -> None:
        """Mark or unmark the channel under the cursor."""
        self._mark_rows(self.table.cursor)

    def _mark_rows(self, start: int) -> None:
        table = self.table
        if not table.row_count:
            return
        [(ffn, [channel])] = self.channels_of(np.array([table.cursor])).items()
        first, last = sorted((start, table.cursor))
        self._mark(self.channels_of(np.arange(first, last + 1)), on=not bool(self.session.marks.of(ffn)[channel]))

    def action_mark_all(self, on: bool) -> None:
        if self.table.row_count:
            self._mark(self.every_channel(), on=on)

    def _mark(self, channels: dict[int, np.ndarray], *, on: bool) -> None:
        snapshot = self.browser.snapshot
        count = sum(map(len, channels.values()))
        [ffn, *others] = channels
        name = snapshot.ffns[ffn].name(with_stack=snapshot.several_stacks)
        where = f"{len(channels):,} FFNs" if others else name
        self.session.mark(channels, f"{f'ch {channels[ffn][0]}' if count == 1 else f'{count:,} channels'} in {where}", on=on)

    def action_back(self) -> None:
        if self.in_range and not self.has_class("-finding"):
            self.action_range()
        else:
            super().action_back()
