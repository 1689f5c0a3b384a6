"""The channels of all FFNs that one filter chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from textual.binding import Binding, BindingType

from chanfmt.base.text import one_line
from chanfmt.format import schema
from tui.screens.base import BACK_BINDINGS, METRIC_BINDINGS, common_bindings
from tui.screens.marking import MARK_BINDINGS, MarkingScreen
from tui.session import view
from tui.session.filter import HINT
from tui.session.place import ASCENDING, Opening, Place
from tui.session.query import MOST_ROWS, ModelChannels
from tui.widgets import panel
from tui.widgets.query_table import QueryTable
from tui.widgets.text import number, percent

if TYPE_CHECKING:
    from collections.abc import Callable

    from tui.session.session import Session
    from tui.widgets.lines import Line

FIRST_FILTER = "super"


class QueryScreen(MarkingScreen):
    """A filter over the whole model. The card shows the channel under the cursor."""

    SCREEN = "query"
    FIND_HINT = "channel id, a layer such as L11, or a label: super, halo, none"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "card", tooltip="open its card (5{key}: row 5)", id="open"),
        Binding("o", "open_layer", "layer", tooltip="open its layer", id="open-layer"),
        Binding("f", "filter", "filter", tooltip="choose channels by a filter", id="filter"),
        *MARK_BINDINGS,
        METRIC_BINDINGS[1],
        *common_bindings("query"),
        *BACK_BINDINGS,
    ]
    table: QueryTable

    def __init__(self, session: Session, opening: Opening) -> None:
        super().__init__(session, QueryTable(ModelChannels(session.browser), self._is_marked))
        place = opening.place
        own = place if place.screen == self.SCREEN else Place(self.SCREEN)
        # The filter of a layer goes on over all layers.
        below = opening.below.filter_text if getattr(opening.below, "SCREEN", "") == "layer" else ""
        self.filter_text = below or own.filter or FIRST_FILTER
        if own.sort:
            self.table.sort_key = self.table.marked = own.sort.removesuffix(ASCENDING)
            self.table.descending = not own.sort.endswith(ASCENDING)
        self._first = opening.ffn, own.channel
        # The results of earlier searches and counts than the last are dropped.
        self._searched = self._counted = 0

    def _is_marked(self, ffn: int, channel: int) -> bool:
        return bool(self.session.marks.of(self._now(ffn))[channel])

    def _now(self, ffn: int) -> int:
        """The FFN of the session's atlas that is FFN ``ffn`` of the table's, which may be an earlier reading."""
        return self.browser.snapshot.nearest(self.table.channels.browser.snapshot.ffns[ffn])

    @property
    def ffn(self) -> int:
        return self._now(self.table.place[0]) if self.table.row_count else self._first[0]

    @property
    def channel(self) -> int:
        """The channel under the cursor."""
        return self.table.place[1] if self.table.row_count else 0

    @property
    def place(self) -> Place:
        table = self.table
        by_default = table.sort_key == self.browser.metric and table.descending
        return replace(
            super().place,
            expert=self.browser.snapshot.ffns[self.ffn].expert,
            channel=self.channel if table.row_count else None,
            filter=self.filter_text,
            sort="" if by_default else table.sort_key + ("" if table.descending else ASCENDING),
        )

    # Searching.

    def show_browser(self) -> None:
        table = self.table
        metric = table.channels.browser.metric
        if table.sort_key == metric:
            table.sort_key = self.browser.metric
        if table.marked == metric:
            table.marked = self.browser.metric
        self._search(self.filter_text, refused=self._show_all)

    def show_marks(self) -> None:
        if "marked" in self.filter_text:
            self._search(self.filter_text, refused=self._show_all)
        super().show_marks()

    def show_ffn(self, ffn: int) -> None:
        """Put the cursor on the first row of ``ffn``, if there is one."""
        if not self.table.row_count:
            return
        start = self.table.channels.position(ffn, 0)
        width = self.browser.snapshot.ffns[ffn].n_channels
        rows = np.flatnonzero((self.table.order >= start) & (self.table.order < start + width))
        if len(rows):
            self.table.go_to(int(rows[0]))

    def _search(self, text: str, *, refused: Callable[[str, str], None]) -> None:
        """Show what the filter ``text`` chooses, once it is computed; or call ``refused`` with ``text`` and the reason."""
        self._searched += 1
        search, table = self._searched, self.table
        channels = table.channels if table.channels.browser is self.browser else ModelChannels(self.browser)
        marked, key, descending = self._marked(), table.sort_key, table.descending

        def work() -> tuple[ModelChannels, np.ndarray, np.ndarray]:
            found = channels.find(text, marked)
            column = key if key == "label" or key in channels.columns else channels.browser.metric
            order = channels.ordered(found, column, descending=descending)
            channels.columns["rank"]  # The rows show it, and it takes time for a large model.
            return channels, found, order

        def then(result: tuple[ModelChannels, np.ndarray, np.ndarray]) -> None:
            if search == self._searched:
                self.filter_text = text
                self._have(*result)

        def not_found(reason: str) -> None:
            if search == self._searched:
                refused(text, reason)

        self.start(work, then, refused=not_found, group="query")

    def _marked(self) -> np.ndarray:
        """Channels with a mark, bool (position,)."""
        return np.concatenate([self.session.marks.of(ffn) for ffn in range(len(self.browser.snapshot.ffns))])

    def _have(self, channels: ModelChannels, found: np.ndarray, order: np.ndarray) -> None:
        table = self.table
        if table.row_count:
            ffn, channel = self.ffn, self.channel
        else:
            ffn, channel = self._first[0], self._first[1] if self._first[1] is not None else -1
        row = view.row_of(order, channels.position(ffn, channel) if channel >= 0 else None, table.cursor)
        table.show(channels, found, order, row)

    def _show_all(self, text: str, reason: str) -> None:
        """Show every channel, because the filter chooses none any more."""
        if text:
            if text != FIRST_FILTER:
                self.say(reason)
            self._search("", refused=self._show_all)

    def action_filter(self) -> None:
        self._ask(self.filter_text)

    def _ask(self, text: str, reason: str = "") -> None:
        self.ask(self.key("filter"), f"layer<4 & {HINT}", self._filter, text, preview=self._count)
        if reason:
            self._remark(reason)

    def _filter(self, text: str) -> None:
        self._search(text, refused=self._ask)

    def _count(self, text: str) -> str:
        """Start to count what the filter ``text`` chooses. The result comes later as a remark."""
        if not text:
            return "all"
        self._counted += 1
        count, channels, marked = self._counted, self.table.channels, self._marked()

        def remark(remark: str) -> None:
            if count == self._counted and self.has_class("-finding"):
                self._remark(remark)

        self.start(lambda: f"{len(channels.find(text, marked)):,} of {len(channels):,}", remark, refused=remark, group="count")
        return "…"

    # Lines.

    def title_texts(self) -> tuple[str, str]:
        table = self.table
        column = next((column for column in table.columns if column.key == table.sort_key), None)
        arrow = "▾" if table.descending else "▴"
        count = f"{len(table.found):,} of {len(table.channels):,} ch"
        if len(table.order) < len(table.found):
            count += f", first {MOST_ROWS:,} shown"
        sort = f"   sort {column.heading} {arrow}" if column else ""
        return one_line(f"{self.session.file_name} ▸ {self.filter_text or 'all'}   {count}{sort}"), (
            f"{self.browser.heading}  query"
        )

    @property
    def channel_text(self) -> str:
        """The channel under the cursor, in words."""
        table = self.table
        if not table.row_count:
            return "searching"
        snapshot = self.browser.snapshot
        label = int(table.channels.labels[table.position])
        return (
            f"row {table.cursor + 1}/{table.row_count}  {snapshot.ffns[self.ffn].name(with_stack=snapshot.several_stacks)}  "
            f"ch {self.channel}  {schema.LABELS.get(label, str(label))}  rank {table.channels.columns['rank'][table.position]}"
        )

    def panel_lines(self, width: int, height: int) -> list[Line]:
        if not self.table.row_count:
            return []
        return panel.layer_panel(self.browser, self.ffn, self.channel, width, height)

    def legend_line(self, width: int) -> Line:
        """What the channels found are, as a whole."""
        table = self.table
        if not table.row_count:
            return []
        channels, found = table.channels, table.found
        values = channels.columns[self.browser.metric] if table.channels.browser is self.browser else None
        text = f" found: super {int((channels.labels[found] == schema.LABEL_SUPERNODE).sum()):,}"
        text += f"  halo {int((channels.labels[found] == schema.LABEL_HALO).sum()):,}"
        text += f"  in {len(channels.by_ffn(found)):,} of {len(self.browser.snapshot.ffns):,} FFNs"
        if values is not None:
            mass = float(np.nansum(values[found], dtype=np.float64))
            share = mass / self.browser.mass if self.browser.mass > 0 else float("nan")
            text += f"  {self.browser.heading} {number(mass)}, {percent(share)} of the model's"
        return [(text, "dim")]

    def copy_text(self) -> str:
        snapshot, ffn = self.browser.snapshot, self.ffn
        place = snapshot.ffns[ffn]
        fields: dict[str, object] = {
            "layer": place.layer_index,
            "stack": place.stack,
            **({} if place.expert is None else {"expert": place.expert}),
            "channel": self.channel,
        }
        fields |= {name: snapshot.value(ffn, self.channel, name) for name in snapshot.metrics}
        return "\t".join(fields) + "\n" + "\t".join(str(value) for value in fields.values()) + "\n"

    # Rows.

    def matches(self, query: str) -> np.ndarray:
        channels, order = self.table.channels, self.table.order
        layer = query.lower().removeprefix("layer").removeprefix("l").strip()
        if layer.isdecimal() and not query.isdecimal():
            return np.asarray(channels.columns["layer"][order] == int(layer))
        if query.isdecimal():
            return np.asarray(channels.columns["channel"][order] == int(query))
        return view.match_channels(channels.labels[order], query)

    def channels_of(self, rows: np.ndarray) -> dict[int, np.ndarray]:
        return self._current(self.table.order[rows])

    def every_channel(self) -> dict[int, np.ndarray]:
        return self._current(self.table.found)

    def _current(self, positions: np.ndarray) -> dict[int, np.ndarray]:
        return {self._now(ffn): ids for ffn, ids in self.table.channels.by_ffn(positions).items()}

    def action_neighbour(self, step: int) -> None:
        """Do nothing: the rows are of all FFNs."""

    def action_open(self) -> None:
        self.table.to_counted_row()
        if self.table.row_count:
            self.open("card")

    def action_open_layer(self) -> None:
        if self.table.row_count:
            self.front.open("layer", Opening(self.ffn, Place("layer", channel=self.channel), self))
