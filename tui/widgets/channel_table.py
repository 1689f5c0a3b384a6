"""The layer screen's table: one row per channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.cells import cell_len

from chanfmt.base.text import one_line
from chanfmt.format import schema
from tui.session import view
from tui.widgets.line_table import Column, LineTable
from tui.widgets.text import percent, whole_or

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tui.session.model import Browser

LABEL_STYLES = {schema.LABEL_HALO: "halo", schema.LABEL_SUPERNODE: "super"}
MARK = "●"


class ChannelTable(LineTable):
    """Channels of one FFN.

    Attributes:
        order: Row to channel, int64 (row,).
        keep: Channels that are shown, bool (channel,) with at least one True; None shows all channels.
        marked_channels: Channels with a mark, bool (channel,).
    """

    def __init__(self, browser: Browser, ffn: int) -> None:
        super().__init__(sort_key=browser.metric, descending=True, marked=browser.metric)
        self.browser = browser
        self.ffn = ffn
        self.order = np.zeros(0, dtype=np.int64)
        self.ranking = browser.ranking(range(ffn, ffn + 1))
        self._arrays: Mapping[str, np.ndarray] = {}
        self._labels = browser.snapshot.labels_of(ffn)
        self._digits = 3
        self.keep: np.ndarray | None = None
        self.marked_channels = np.zeros(len(self._labels), dtype=bool)

    @property
    def channel(self) -> int:
        """The channel under the cursor."""
        return int(self.order[self.cursor])

    def show(
        self,
        browser: Browser,
        ffn: int,
        *,
        marks: np.ndarray,
        keep: np.ndarray | None = None,
        channel: int | None = None,
        row: int = 0,
    ) -> None:
        """Show FFN ``ffn`` of ``browser`` in the same order as before, with the cursor on ``channel`` or else on ``row``."""
        self.keep, self.marked_channels = keep, marks
        if self.sort_key == self.browser.metric:
            self.sort_key = browser.metric
        if self.marked == self.browser.metric:
            self.marked = browser.metric
        self.browser = browser
        self.ffn = ffn
        self.ranking = browser.ranking(range(ffn, ffn + 1))
        self._labels = browser.snapshot.labels_of(ffn)
        self.layout_columns()
        self.sort(channel=channel, row=row)

    def sort(self, *, channel: int | None = None, row: int = 0) -> None:
        """Sort the rows, and put the cursor on ``channel`` or else on ``row``."""
        order = view.order_by(self._sort_values(), descending=self.descending)
        self.order = order if self.keep is None else order[self.keep[order]]
        self.set_rows(len(self.order), view.row_of(self.order, channel, row))

    def layout_columns(self) -> None:
        """Choose columns and digits that suit the width."""
        snapshot, metric = self.browser.snapshot, self.browser.metric
        self._digits = 4 if self.row_width >= 100 else 3
        width = self._digits + 5
        others = [name for name in snapshot.metrics if name != metric]
        self._arrays = {name: snapshot.values(self.ffn, name) for name in (metric, *others)}
        ids = max(5, len(str(len(self._labels) - 1)))
        columns = (
            Column("rank", "rank", ids),
            Column("channel", "ch", ids),
            Column("label", "label", 7),
            self._metric_column(metric, width),
            Column("share", "share", 6),
            Column("cumulative", "cum", 6),
            *(self._metric_column(name, width) for name in others),
        )
        self.set_columns(columns, 4)

    def _metric_column(self, name: str, width: int) -> Column:
        heading = one_line(self.browser.snapshot.metrics[name].heading)
        return Column(name, heading, max(width, cell_len(heading) + 1))

    def on_resize(self) -> None:
        self.layout_columns()
        super().on_resize()

    def cells(self, row: int, columns: Sequence[Column]) -> list[tuple[str, str]]:
        channel = int(self.order[row])
        return [self._cell(column.key, channel) for column in columns]

    def _cell(self, key: str, channel: int) -> tuple[str, str]:
        if key in self._arrays:
            metric = self.browser.snapshot.metrics[key]
            return whole_or(float(self._arrays[key][channel]), metric.dtype, self._digits), ""
        if key == "label":
            label = int(self._labels[channel])
            mark = MARK if self.marked_channels[channel] else ""
            return mark + view.LABEL_TEXT.get(label, str(label)), LABEL_STYLES.get(label, "")
        if key in ("share", "cumulative"):
            shares = self.ranking.share if key == "share" else self.ranking.cumulative
            return percent(float(shares[channel]), 2 if self._digits == 4 else 1), ""
        return str(channel if key == "channel" else self.ranking.rank[channel]), ""

    def shown(self) -> dict[str, np.ndarray]:
        labels = np.array([schema.LABELS.get(label, str(label)) for label in self._labels.tolist()])
        columns = {"channel": np.arange(len(labels)), "label": labels, "marked": self.marked_channels, **self.columns_by_name()}
        return {name: values[self.order] for name, values in columns.items()}

    def columns_by_name(self) -> dict[str, np.ndarray]:
        """Columns that a filter may compare: name to values, (channel,)."""
        return self.browser.columns(self.ffn)

    def _sort_values(self) -> np.ndarray:
        if self.sort_key == "rank":
            return self.ranking.rank
        if self.sort_key == "channel":
            return np.arange(len(self._labels))
        if self.sort_key == "label":
            return self._labels
        # Shares are in the order of the metric, but rounding could reorder ties among shares.
        if self.sort_key == "share":
            return self.ranking.values
        if self.sort_key == "cumulative":
            return self.ranking.cumulative
        return self._arrays[self.sort_key]
