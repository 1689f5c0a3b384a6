"""The first screen: every FFN of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from textual.binding import Binding, BindingType

from tui import panel, view
from tui.screens.base import COMMON_BINDINGS, METRIC_BINDINGS, BrowserScreen
from tui.text import count, number, percent
from tui.themes import GLYPH_RAMP

if TYPE_CHECKING:
    from textual.theme import Theme

    from tui.widgets.layer_table import LayerTable
    from tui.widgets.lines import Line


class OverviewScreen(BrowserScreen):
    """FFNs with their mass, concentration and heat strip."""

    FIND_HINT = "layer number, or part of a stack or module name"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "layer", tooltip="open the layer"),
        *METRIC_BINDINGS, *COMMON_BINDINGS,
        Binding("q", "app.leave_program", "quit", show=False, tooltip="quit"),
        Binding("escape", "escape", "close", show=False, tooltip="close or clear"),
    ]
    table: LayerTable

    @property
    def ffn(self) -> int:
        return self.table.ffn

    def on_mount(self) -> None:
        super().on_mount()
        self.app.theme_changed_signal.subscribe(self, self._theme_changed)

    def _theme_changed(self, theme: Theme) -> None:
        self.table.set_ramp(self.atlas_app.ramp)
        self.paint()

    def show_browser(self) -> None:
        ffn = self.table.ffn if self.table.row_count else 0
        self.table.show(self.browser, min(ffn, len(self.browser.snapshot.ffns) - 1))

    def show_ffn(self, ffn: int) -> None:
        """Put the cursor on ``ffn``."""
        self.table.go_to(int(np.flatnonzero(self.table.order == ffn)[0]))

    def title_texts(self) -> tuple[str, str]:
        snapshot = self.browser.snapshot
        widths = sorted({ffn.n_channels for ffn in snapshot.ffns})
        channels = f"{widths[0]:,}" if len(widths) == 1 else f"{widths[0]:,}–{widths[-1]:,}"
        rows = "FFNs" if snapshot.several_stacks else "layers"
        size = f"{len(snapshot.ffns)} {rows} × {channels} ch"
        partial = "" if snapshot.status == "complete" else f"   {snapshot.status}"
        name = self.atlas_app.file_name
        left = f"{name}   {snapshot.model_id}   {size}   {snapshot.tokens:,} tokens{partial}"
        return left, f"{self.browser.heading}  overview"

    def status_text(self) -> str:
        ffn = self.browser.snapshot.ffns[self.table.ffn]
        summary = self.browser.summaries[self.table.ffn]
        measured = summary.concentration
        stack = f" {ffn.stack}" if self.browser.snapshot.several_stacks else ""
        return (
            f"L{ffn.layer_index}{stack}  mass {number(measured.mass)}  "
            f"{self.browser.top_heading} {percent(measured.top_share)}  n_eff {count(measured.effective_channels)}  "
            f"super {summary.supernodes:,}  halo {summary.halo:,}  "
            f"protected {self.atlas_app.marks.counts[self.table.ffn]:,}"
        )

    def panel_lines(self, width: int, height: int) -> list[Line]:
        return panel.overview_panel(self.browser, self.table.ffn, width, height)

    def legend_line(self, width: int) -> Line:
        below = self.table.row_count - self.table.page_rows
        more = f" ⋮ {below} more" if below > 0 else ""
        totals = f"  total mass {number(self.browser.mass, 4)}"
        if width >= 110:
            summaries = self.browser.summaries
            totals += f"  super {sum(item.supernodes for item in summaries):,}"
            totals += f"  halo {sum(item.halo for item in summaries):,}"
        label = f"share of layer {self.browser.heading}  low "
        ramp = self.table.heat.segments(self._ramp_levels(), self.table.style(""))
        used = len(more) + len(totals) + len(label) + sum(len(text) for text, _, _ in ramp) + 6
        gap = " " * max(2, width - used)
        colours = [(text, style or "") for text, style, _ in ramp]
        return [(f"{more}{totals}{gap}{label}", "dim"), *colours, (" high", "dim")]

    def _ramp_levels(self) -> np.ndarray:
        heat = self.table.heat
        if heat.samples_per_cell == 1:
            return np.arange(1, len(GLYPH_RAMP))
        return np.repeat(np.arange(1, heat.steps + 1), 2)

    def copy_text(self) -> str:
        ffn = self.browser.snapshot.ffns[self.table.ffn]
        summary = self.browser.summaries[self.table.ffn]
        measured = summary.concentration
        fields: dict[str, object] = {
            "layer": ffn.layer_index, "stack": ffn.stack, "channels": ffn.n_channels, "metric": self.browser.metric,
            "mass": measured.mass, "top_share": measured.top_share, "effective_channels": measured.effective_channels,
            "supernodes": summary.supernodes, "halo": summary.halo,
        }
        return "\t".join(fields) + "\n" + "\t".join(str(value) for value in fields.values()) + "\n"

    def matches(self, query: str) -> np.ndarray:
        return view.match_ffns(self.browser.snapshot, query)[self.table.order]
