"""Channels of one FFN in two atlases, joined by their ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chanfmt import schema
from tui import view
from tui.text import number
from tui.widgets.channel_table import LABEL_STYLES
from tui.widgets.line_table import Column, LineTable

if TYPE_CHECKING:
    from tui.comparison import Joined


class JoinTable(LineTable):
    """Channels in the order asked for; ``order`` maps rows to channels.

    Attributes:
        width: Channels of an expert; a channel of one is told as EXPERT:CHANNEL.
        keep: Channels that are shown, bool (channel,), at least one; None for all.
    """

    def __init__(self) -> None:
        super().__init__(sort_key="rank_a", descending=False, marked="rank_b")
        self.joined: Joined | None = None
        self.heading = ""
        self.width = 0
        self.keep: np.ndarray | None = None
        self.order = np.zeros(0, dtype=np.int64)
        self._columns: dict[str, np.ndarray] = {}

    @property
    def channel(self) -> int:
        """The channel under the cursor."""
        return int(self.order[self.cursor])

    def show(self, joined: Joined, heading: str, width: int, *, keep: np.ndarray | None = None, row: int = 0) -> None:
        """Show ``joined``, values under ``heading``, sorted as before, the cursor on ``row``."""
        self.joined, self.heading, self.width, self.keep = joined, heading, width, keep
        first, second = joined.first, joined.second
        self._columns = {
            "channel": np.arange(len(first.rank)), "rank_a": first.rank, "rank_b": second.rank,
            "moved": second.rank - first.rank, "a": first.values, "b": second.values, "share_a": first.share,
            "share_b": second.share, "ratio": joined.ratio,
        }
        self.layout_columns()
        self.sort(row=row)

    def sort(self, *, row: int = 0) -> None:
        if self.joined is None:
            return
        if self.sort_key in ("label_a", "label_b"):
            values = self.joined.labels[int(self.sort_key == "label_b")]
        else:
            values = self._columns[self.sort_key]
        order = view.order_by(values, descending=self.descending)
        self.order = order if self.keep is None else order[self.keep[order]]
        self.set_rows(len(self.order), row)

    def layout_columns(self) -> None:
        """Choose columns for the width."""
        ids = max(6, len(self.channel_name(len(self._columns["channel"]) - 1))) if self._columns else 6
        self.set_columns((
            Column("channel", "ch", ids), Column("label_a", "A", 6), Column("label_b", "B", 6),
            Column("rank_a", "A rank", ids + 1), Column("rank_b", "B rank", ids + 1), Column("moved", "moved", ids + 1),
            Column("a", f"A {self.heading}"[:9], 9), Column("b", f"B {self.heading}"[:9], 9), Column("ratio", "B/A", 8),
        ), 3)

    def on_resize(self) -> None:
        self.layout_columns()
        super().on_resize()

    def channel_name(self, channel: int) -> str:
        """How ``channel`` is told."""
        return f"{channel // self.width}:{channel % self.width}" if self.width else str(channel)

    def shown(self) -> dict[str, np.ndarray]:
        assert self.joined is not None
        labels = {key: np.array([schema.LABELS.get(label, str(label)) for label in values.tolist()])
                  for key, values in zip(("label_a", "label_b"), self.joined.labels, strict=True)}
        columns = self._columns | labels
        if self.width:
            columns["channel"] = np.array([self.channel_name(channel) for channel in self._columns["channel"].tolist()])
        return {name: values[self.order] for name, values in columns.items()}

    def columns_by_name(self) -> dict[str, np.ndarray]:
        """What a filter may compare: name to values, (channel,)."""
        return self._columns

    def cells(self, row: int) -> list[tuple[str, str]]:
        assert self.joined is not None
        channel = int(self.order[row])
        columns = self._columns
        labels = [int(labels[channel]) for labels in self.joined.labels]
        return [
            (self.channel_name(channel), ""),
            *((view.LABEL_TEXT.get(label, str(label)), LABEL_STYLES.get(label, "")) for label in labels),
            *((str(columns[key][channel]), "") for key in ("rank_a", "rank_b")),
            (f"{columns['moved'][channel]:+d}", ""),
            *((number(float(columns[key][channel])), "") for key in ("a", "b", "ratio")),
        ]
