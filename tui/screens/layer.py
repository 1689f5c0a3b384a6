"""The second screen: every channel of one FFN."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding, BindingType

from chanfmt import schema
from tui import panel, view
from tui.screens.base import COMMON_BINDINGS, BrowserScreen
from tui.text import percent
from tui.widgets.channel_table import ChannelTable

if TYPE_CHECKING:
    import numpy as np

    from tui.model import Browser
    from tui.widgets.lines import Line


class LayerScreen(BrowserScreen):
    """Channels with their rank, label and metrics."""

    FIND_HINT = "channel id, or a label: super, halo, none"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left_square_bracket", "neighbour(-1)", "layer", key_display="[", tooltip="previous layer"),
        Binding("right_square_bracket", "neighbour(1)", "layer", key_display="]", tooltip="next layer"),
        *COMMON_BINDINGS,
        Binding("q,escape", "back", "back", tooltip="back to the overview"),
    ]
    table: ChannelTable

    def __init__(self, browser: Browser, ffn: int) -> None:
        super().__init__(ChannelTable(browser, ffn))

    def show_browser(self) -> None:
        table = self.table
        ffn = min(table.ffn, len(self.browser.snapshot.ffns) - 1)
        table.show(self.browser, ffn, channel=table.channel if table.row_count else None, row=table.cursor)

    def title_texts(self) -> tuple[str, str]:
        table, snapshot = self.table, self.browser.snapshot
        column = next(column for column in table.columns if column.key == table.sort_key)
        arrow = "▾" if table.descending else "▴"
        name = snapshot.ffns[table.ffn].name(with_stack=snapshot.several_stacks)
        left = f"{self.atlas_app.file_name} ▸ {name}   {table.row_count:,} ch   sort {column.heading} {arrow}"
        return left, f"{self.browser.heading}  layer"

    def status_text(self) -> str:
        table = self.table
        label = int(self.browser.snapshot.labels_of(table.ffn)[table.channel])
        return (
            f"row {table.cursor + 1:,}/{table.row_count:,}  ch {table.channel:,}  "
            f"{schema.LABELS.get(label, str(label))}  rank {table.ranking.rank[table.channel]:,}  "
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
            "layer": ffn.layer_index, "stack": ffn.stack, "channel": table.channel,
            "label": schema.LABELS.get(label, str(label)),
        }
        fields |= {name: float(snapshot.values(table.ffn, name)[table.channel]) for name in snapshot.metrics}
        return "\t".join(fields) + "\n" + "\t".join(str(value) for value in fields.values()) + "\n"

    def matches(self, query: str) -> np.ndarray:
        return view.match_channels(self.browser.snapshot.labels_of(self.table.ffn), query)[self.table.order]

    def action_neighbour(self, step: int) -> None:
        last = len(self.browser.snapshot.ffns) - 1
        ffn = max(0, min(self.table.ffn + step * (self.table.take_count() or 1), last))
        if ffn != self.table.ffn:
            self.table.show(self.browser, ffn, row=self.table.cursor)

    def action_back(self) -> None:
        if self.has_class("-finding"):
            self.close_find()
        else:
            self.atlas_app.leave_layer(self.table.ffn)
