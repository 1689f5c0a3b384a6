"""Every channel of one FFN."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from textual.binding import Binding, BindingType

from chanfmt.base.errors import UsageError
from chanfmt.base.text import one_line
from chanfmt.format import schema
from tui.screens.base import BACK_BINDINGS, METRIC_BINDINGS, common_bindings
from tui.screens.marking import MARK_BINDINGS, MarkingScreen
from tui.session import view
from tui.session.filter import HINT, counted, filtered, refusal
from tui.session.place import ASCENDING
from tui.widgets import panel
from tui.widgets.channel_table import ChannelTable
from tui.widgets.text import percent

if TYPE_CHECKING:
    from tui.session.place import Opening, Place
    from tui.session.session import Session
    from tui.widgets.lines import Line


class LayerScreen(MarkingScreen):
    """Channels with their rank, label and metrics. The card and the scatter show what this screen has selected."""

    SCREEN = "layer"
    FIND_HINT = "channel id, or a label: super, halo, none"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "card", tooltip="open its card (5{key}: row 5)", id="open"),
        Binding("x", "scatter", "scatter", tooltip="plot metric against metric", id="scatter"),
        Binding("left_square_bracket", "neighbour(-1)", "layer", tooltip="previous layer", id="previous-layer"),
        Binding("right_square_bracket", "neighbour(1)", "layer", tooltip="next layer", id="next-layer"),
        *MARK_BINDINGS,
        Binding("f", "filter", "filter", tooltip="show only some channels", id="filter"),
        *METRIC_BINDINGS,
        *common_bindings("layer"),
        *BACK_BINDINGS,
    ]
    table: ChannelTable

    def __init__(self, session: Session, opening: Opening) -> None:
        super().__init__(session, ChannelTable(session.browser, opening.ffn))
        self.filter_text = opening.place.filter
        self._first_channel = opening.place.channel
        sort = opening.place.sort
        if sort:
            self.table.sort_key = self.table.marked = sort.removesuffix(ASCENDING)
            self.table.descending = not sort.endswith(ASCENDING)

    @property
    def ffn(self) -> int:
        return self.table.ffn

    @property
    def place(self) -> Place:
        table = self.table
        by_default = table.sort_key == self.browser.metric and table.descending
        return replace(
            super().place,
            expert=self.browser.snapshot.ffns[self.ffn].expert,
            channel=table.channel,
            filter=self.filter_text,
            sort="" if by_default else table.sort_key + ("" if table.descending else ASCENDING),
        )

    def show_ffn(self, ffn: int) -> None:
        """Show the channels of ``ffn``."""
        self._show(ffn, None)

    def show_marks(self) -> None:
        self.table.marked_channels = self.session.marks.of(self.ffn)
        if "marked" in self.filter_text:
            self.show_browser()
        super().show_marks()

    def show_browser(self) -> None:
        table = self.table
        ffn = self.browser.snapshot.nearest(table.browser.snapshot.ffns[table.ffn])
        self._show(ffn, table.channel if table.row_count else self._first_channel)

    def _show(self, ffn: int, channel: int | None) -> None:
        table = self.table
        marks = self.session.marks.of(ffn)
        table.show(self.browser, ffn, marks=marks, channel=channel, row=table.cursor)
        if not self.filter_text:
            return
        try:
            keep = filtered(self.filter_text, table.columns_by_name(), *self._known)
        except UsageError as error:
            self.filter_text = ""
            self.say(one_line(f"{error.message}; {error.hint}"))
            return
        if not keep.any():
            self.say(f"no channel here fits {self.filter_text}")
            self.filter_text = ""
            return
        table.show(self.browser, ffn, marks=marks, keep=keep, channel=channel, row=table.cursor)

    def title_texts(self) -> tuple[str, str]:
        table, snapshot = self.table, self.browser.snapshot
        column = next(column for column in table.columns if column.key == table.sort_key)
        arrow = "▾" if table.descending else "▴"
        name = snapshot.ffns[table.ffn].name(with_stack=snapshot.several_stacks)
        channels = f"{table.row_count:,} ch"
        if self.filter_text:
            channels = f"{table.row_count:,} of {snapshot.ffns[table.ffn].n_channels:,} ch: {self.filter_text}"
        left = f"{self.session.file_name} ▸ {name}   {channels}   sort {column.heading} {arrow}"
        return left, f"{self.browser.heading}  layer"

    @property
    def channel_text(self) -> str:
        """The channel under the cursor, in words."""
        table = self.table
        label = int(self.browser.snapshot.labels_of(table.ffn)[table.channel])
        return (
            f"row {table.cursor + 1}/{table.row_count}  ch {table.channel}  "
            f"{schema.LABELS.get(label, str(label))}  rank {table.ranking.rank[table.channel]}  "
            f"cum {percent(float(table.ranking.cumulative[table.channel]))} of layer {self.browser.heading}"
        )

    def panel_lines(self, width: int, height: int) -> list[Line]:
        return panel.layer_panel(self.browser, self.table.ffn, self.table.channel, width, height)

    def legend_line(self, width: int) -> Line:
        if self.has_class("-wide"):
            return panel.layer_line(self.browser, self.table.ffn)
        return panel.mini_plots(self.browser, self.table.ffn, width)

    def copy_text(self) -> str:
        table, snapshot = self.table, self.browser.snapshot
        ffn = snapshot.ffns[table.ffn]
        label = int(snapshot.labels_of(table.ffn)[table.channel])
        fields: dict[str, object] = {
            "layer": ffn.layer_index,
            "stack": ffn.stack,
            **({} if ffn.expert is None else {"expert": ffn.expert}),
            "channel": table.channel,
            "label": schema.LABELS.get(label, str(label)),
        }
        fields |= {name: float(snapshot.values(table.ffn, name)[table.channel]) for name in snapshot.metrics}
        return "\t".join(fields) + "\n" + "\t".join(str(value) for value in fields.values()) + "\n"

    @property
    def channel(self) -> int:
        """The channel under the cursor."""
        return self.table.channel

    def step_channel(self, step: int) -> None:
        """Move the cursor by ``step`` rows."""
        self.table.action_move(step)

    def matches(self, query: str) -> np.ndarray:
        return view.match_channels(self.browser.snapshot.labels_of(self.table.ffn), query)[self.table.order]

    def action_neighbour(self, step: int) -> None:
        last = len(self.browser.snapshot.ffns) - 1
        ffn = max(0, min(self.table.ffn + step * (self.table.take_count() or 1), last))
        if ffn != self.table.ffn:
            self._show(ffn, None)

    def channels_of(self, rows: np.ndarray) -> dict[int, np.ndarray]:
        return {self.ffn: np.sort(self.table.order[rows])}

    def every_channel(self) -> dict[int, np.ndarray]:
        return {self.ffn: np.sort(self.table.order)}

    def action_open(self) -> None:
        self.table.to_counted_row()
        self.open("card")

    def action_scatter(self) -> None:
        self.open("scatter")

    def action_filter(self) -> None:
        self.ask(self.key("filter"), HINT, self._filter, self.filter_text, preview=self._count, refusal=self._refused)

    def _count(self, text: str) -> str:
        return counted(text, self.table.columns_by_name(), *self._known)

    def _refused(self, text: str) -> str:
        return refusal(text, self.table.columns_by_name(), *self._known)

    @property
    def _known(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Labels and further words that a filter may use."""
        return self.browser.snapshot.labels_of(self.ffn), {"marked": self.session.marks.of(self.ffn)}

    def _filter(self, text: str) -> None:
        self.filter_text = text
        self._show(self.ffn, self.table.channel)

    def action_back(self) -> None:
        if self.has_class("-finding"):
            self.close_find()
        elif self.filter_text and not self.in_range:
            self._filter("")
        else:
            super().action_back()
