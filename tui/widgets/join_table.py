"""The join screen's table: the channels of one block in two atlases."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chanfmt.format import schema
from tui.session import view
from tui.widgets.channel_table import LABEL_STYLES
from tui.widgets.line_table import Column, LineTable
from tui.widgets.text import left, number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tui.session.comparison import Joined

LABEL_KEYS = ("label_a", "label_b")


class JoinTable(LineTable):
    """A row per channel.

    Attributes:
        order: Row to channel, int64 (row,).
        width: Channels per expert, whose channels are named EXPERT:CHANNEL; 0 if the block is dense.
        keep: Channels that are shown, bool (channel,) with at least one True; None shows all channels.
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

    def show(
        self,
        joined: Joined,
        heading: str,
        width: int,
        *,
        keep: np.ndarray | None = None,
        channel: int | None = None,
        row: int = 0,
    ) -> None:
        """Show ``joined`` in the same order as before, with the cursor on ``channel`` or else on ``row``.

        Args:
            heading: Column heading of the metric.
            width: As the attribute.
            keep: As the attribute.
        """
        self.joined, self.heading, self.width, self.keep = joined, heading, width, keep
        self._columns = joined.columns
        self.layout_columns()
        self.sort(channel=channel, row=row)

    def sort(self, *, channel: int | None = None, row: int = 0) -> None:
        """Sort the rows, and put the cursor on ``channel`` or else on ``row``."""
        if self.joined is None:
            return
        if self.sort_key in LABEL_KEYS:
            values = self.joined.labels[LABEL_KEYS.index(self.sort_key)]
        else:
            values = self._columns[self.sort_key]
        order = view.order_by(values, descending=self.descending)
        self.order = order if self.keep is None else order[self.keep[order]]
        self.set_rows(len(self.order), view.row_of(self.order, channel, row))

    def layout_columns(self) -> None:
        """Choose columns that suit the width."""
        ids = max(6, len(self.channel_name(len(self._columns["channel"]) - 1))) if self._columns else 6
        self.set_columns(
            (
                Column("channel", "ch", ids),
                Column("label_a", "A", 6),
                Column("label_b", "B", 6),
                Column("rank_a", "A rank", ids + 1),
                Column("rank_b", "B rank", ids + 1),
                Column("moved", "moved", ids + 1),
                Column("a", left(f"A {self.heading}", 9).rstrip(), 9),
                Column("b", left(f"B {self.heading}", 9).rstrip(), 9),
                Column("ratio", "B/A", 8),
            ),
            3,
        )

    def on_resize(self) -> None:
        self.layout_columns()
        super().on_resize()

    def channel_name(self, channel: int) -> str:
        """The name of ``channel`` on the screen."""
        return f"{channel // self.width}:{channel % self.width}" if self.width else str(channel)

    def named(self, name: str) -> int | None:
        """The channel that `channel_name` calls ``name``, if ``name`` is EXPERT:CHANNEL; None otherwise."""
        expert, colon, channel = name.partition(":")
        if not (self.width and colon and expert.isdecimal() and channel.isdecimal() and int(channel) < self.width):
            return None
        return int(expert) * self.width + int(channel)

    def shown(self) -> dict[str, np.ndarray]:
        assert self.joined is not None
        labels = {
            key: np.array([schema.LABELS.get(label, str(label)) for label in values.tolist()])
            for key, values in zip(LABEL_KEYS, self.joined.labels, strict=True)
        }
        columns = self._columns | labels
        if self.width:
            columns["channel"] = np.array([self.channel_name(channel) for channel in self._columns["channel"].tolist()])
        return {name: values[self.order] for name, values in columns.items()}

    def columns_by_name(self) -> dict[str, np.ndarray]:
        """Columns that a filter may compare: name to values, (channel,)."""
        return self._columns

    def cells(self, row: int, columns: Sequence[Column]) -> list[tuple[str, str]]:
        channel = int(self.order[row])
        return [self._cell(column.key, channel) for column in columns]

    def _cell(self, key: str, channel: int) -> tuple[str, str]:
        assert self.joined is not None
        if key == "channel":
            return self.channel_name(channel), ""
        if key in LABEL_KEYS:
            label = int(self.joined.labels[LABEL_KEYS.index(key)][channel])
            return view.LABEL_TEXT.get(label, str(label)), LABEL_STYLES.get(label, "")
        value = self._columns[key][channel]
        if key == "moved":
            return f"{value:+d}", ""
        return str(value) if key in ("rank_a", "rank_b") else number(float(value)), ""
