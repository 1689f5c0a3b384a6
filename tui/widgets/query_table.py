"""The query screen's table: one row per channel that a filter chooses, of all FFNs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.cells import cell_len

from chanfmt.base.text import one_line
from chanfmt.format import schema
from tui.session import view
from tui.widgets.channel_table import LABEL_STYLES, MARK
from tui.widgets.line_table import Column, LineTable
from tui.widgets.text import percent, whole_or

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tui.session.query import ModelChannels


class QueryTable(LineTable):
    """Channels of all FFNs.

    Args:
        channels: The channels of the model.
        marked: Says whether a channel of an FFN has a mark.

    Attributes:
        channels: The channels of the model.
        found: Positions that the filter chooses, ascending, int64 (n,).
        order: Row to position, int64 (row,). If many channels are found, the first rows only.
    """

    def __init__(self, channels: ModelChannels, marked: Callable[[int, int], bool]) -> None:
        super().__init__(sort_key=channels.browser.metric, descending=True, marked=channels.browser.metric)
        self.channels = channels
        self.found = np.zeros(0, dtype=np.int64)
        self.order = np.zeros(0, dtype=np.int64)
        self._is_marked = marked
        self._digits = 3

    @property
    def position(self) -> int:
        """The channel under the cursor, as a position in ``channels``."""
        return int(self.order[self.cursor])

    @property
    def place(self) -> tuple[int, int]:
        """FFN and id of the channel under the cursor."""
        return self.channels.at(self.position)

    def show(self, channels: ModelChannels, found: np.ndarray, order: np.ndarray, cursor: int) -> None:
        """Show ``order``, which is ``found`` sorted by ``sort_key``, with the cursor on row ``cursor``."""
        self.channels, self.found, self.order = channels, found, order
        self.layout_columns()
        self.set_rows(len(order), cursor)

    def sort(self) -> None:
        self.order = self.channels.ordered(self.found, self.sort_key, descending=self.descending)
        self.set_rows(len(self.order), 0)

    def layout_columns(self) -> None:
        """Choose columns and digits that suit the width."""
        snapshot, metric = self.channels.browser.snapshot, self.channels.browser.metric
        self._digits = 4 if self.row_width >= 100 else 3
        ids = max(5, len(str(max(ffn.n_channels for ffn in snapshot.ffns) - 1)))
        columns = [
            Column("layer", "layer", 5),
            *([Column("expert", "expert", 6)] if snapshot.has_experts else []),
            Column("channel", "ch", ids),
            Column("label", "label", 7),
        ]
        others = [name for name in snapshot.metrics if name != metric]
        self.set_columns(
            (
                *columns,
                self._metric_column(metric),
                Column("rank", "rank", ids),
                Column("share", "share", 6),
                Column("cumulative", "cum", 6),
                *map(self._metric_column, others),
            ),
            len(columns),
        )

    def _metric_column(self, name: str) -> Column:
        heading = one_line(self.channels.browser.snapshot.metrics[name].heading)
        return Column(name, heading, max(self._digits + 5, cell_len(heading) + 1))

    def on_resize(self) -> None:
        self.layout_columns()
        super().on_resize()

    def cells(self, row: int, columns: Sequence[Column]) -> list[tuple[str, str]]:
        position = int(self.order[row])
        ffn, channel = self.channels.at(position)
        return [self._cell(column.key, position, ffn, channel) for column in columns]

    def _cell(self, key: str, position: int, ffn: int, channel: int) -> tuple[str, str]:
        snapshot = self.channels.browser.snapshot
        if key in snapshot.metrics:
            # One number of the file costs less than a column of all channels.
            return whole_or(snapshot.value(ffn, channel, key), snapshot.metrics[key].dtype, self._digits), ""
        if key == "label":
            label = int(self.channels.labels[position])
            mark = MARK if self._is_marked(ffn, channel) else ""
            return mark + view.LABEL_TEXT.get(label, str(label)), LABEL_STYLES.get(label, "")
        if key in ("share", "cumulative"):
            return percent(float(self.channels.columns[key][position]), 2 if self._digits == 4 else 1), ""
        if key == "rank":
            return str(self.channels.columns[key][position]), ""
        place = snapshot.ffns[ffn]
        number = {"layer": place.layer_index, "expert": place.expert, "channel": channel}[key]
        return "-" if number is None else str(number), ""

    def shown(self) -> dict[str, np.ndarray]:
        channels = self.channels
        ffns = channels.browser.snapshot.ffns
        places = [channels.at(position) for position in self.order.tolist()]
        labels = [schema.LABELS.get(label, str(label)) for label in channels.labels[self.order].tolist()]
        first = {
            "stack": np.array([ffns[ffn].stack for ffn, _ in places]),
            "label": np.array(labels),
            "marked": np.array([self._is_marked(*place) for place in places]),
        }
        return first | {name: channels.columns[name][self.order] for name in channels.names}
