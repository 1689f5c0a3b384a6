"""What the overview and the experts screen have in common: FFNs with mass, concentration and a heat strip."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.cells import cell_len

from chanfmt.analysis import strip
from tui.screens.ffns import FfnScreen
from tui.widgets import panel
from tui.widgets.text import count, number, percent
from tui.widgets.themes import GLYPH_RAMP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from textual.theme import Theme

    from tui.widgets.layer_table import LayerTable
    from tui.widgets.lines import Line


class LayerTableScreen(FfnScreen):
    """A table of FFNs with mass, concentration and heat strip. Subclasses choose the FFNs."""

    table: LayerTable

    def spans(self) -> Sequence[range]:
        """What the rows stand for, as ranges of FFNs in model order."""
        raise NotImplementedError

    def on_mount(self) -> None:
        super().on_mount()
        self.app.theme_changed_signal.subscribe(self, self._theme_changed)
        # The legend counts the rows below the visible rows.
        self.watch(self.table, "scroll_y", self.paint_legend, init=False)

    def _theme_changed(self, theme: Theme) -> None:
        self.table.set_ramp(self.front.ramp)
        self.paint()

    def show_browser(self) -> None:
        self.table.show(self.browser, self.spans(), self.ffn)

    def status_text(self) -> str:
        span = self.table.span
        ffn, summary = self.browser.snapshot.ffns[span[0]], self.browser.summary(span)
        measured = summary.concentration
        stack = f" {ffn.stack}" if self.browser.snapshot.several_stacks else ""
        expert = f" expert {ffn.expert}" if self.table.of_experts else ""
        counts = self.session.marks.counts
        return (
            f"L{ffn.layer_index}{stack}{expert}  mass {number(measured.mass)}  "
            f"{self.browser.top_heading} {percent(measured.top_share)}  n_eff {count(measured.effective_channels)}  "
            f"super {summary.supernodes:,}  halo {summary.halo:,}  "
            f"protected {sum(counts[number] for number in span):,}"
        )

    def panel_lines(self, width: int, height: int) -> list[Line]:
        return panel.overview_panel(self.browser, self.table.span, width, height)

    def legend_line(self, width: int) -> Line:
        below = self.table.row_count - self.table.scroll_offset.y - self.table.page_rows
        more = f" ⋮ {below} more" if below > 0 else ""
        summaries = [self.browser.summary(span) for span in self.table.spans]
        mass = float(np.nansum([item.concentration.mass for item in summaries]))
        totals = f"  total mass {number(mass, 4)}"
        if width >= 110:
            totals += f"  super {sum(item.supernodes for item in summaries):,}"
            totals += f"  halo {sum(item.halo for item in summaries):,}"
        low, high = self._ramp_ends()
        label = f"share of {'expert' if self.table.of_experts else 'layer'} {self.browser.heading}  {low} "
        ramp = self.table.heat.segments(self._ramp_levels(), self.table.style(""))
        used = cell_len(more + totals + label) + sum(len(text) for text, _, _ in ramp) + 1 + len(high)
        gap = " " * max(2, width - used)
        colours = [(text, style or "") for text, style, _ in ramp]
        return [(f"{more}{totals}{gap}{label}", "dim"), *colours, (f" {high}", "dim")]

    def _ramp_ends(self) -> tuple[str, str]:
        """What the lowest and the highest level stand for: a channel's share of the FFN, if all FFNs have as many channels."""
        widths = {sum(self.browser.snapshot.ffns[ffn].n_channels for ffn in span) for span in self.table.spans}
        return (f"{number(100 * strip.FLOOR / widths.pop(), 1)}%", "100%") if len(widths) == 1 else ("low", "high")

    def _ramp_levels(self) -> np.ndarray:
        heat = self.table.heat
        if heat.samples_per_cell == 1:
            return np.arange(1, len(GLYPH_RAMP))
        return np.repeat(np.arange(1, heat.steps + 1), 2)

    def copy_text(self) -> str:
        span = self.table.span
        ffn, summary = self.browser.snapshot.ffns[span[0]], self.browser.summary(span)
        measured = summary.concentration
        fields: dict[str, object] = {
            "layer": ffn.layer_index,
            "stack": ffn.stack,
            **({"expert": ffn.expert} if self.table.of_experts else {}),
            "channels": len(span) * ffn.n_channels,
            "metric": self.browser.metric,
            "mass": measured.mass,
            "top_share": measured.top_share,
            "effective_channels": measured.effective_channels,
            "supernodes": summary.supernodes,
            "halo": summary.halo,
        }
        return "\t".join(fields) + "\n" + "\t".join(str(value) for value in fields.values()) + "\n"
