"""The first screen, every FFN of the model; and what one with experts opens to, every expert of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from textual.binding import Binding, BindingType

from tui.screens.base import BACK_BINDING, COMMON_BINDINGS, METRIC_BINDINGS
from tui.screens.ffns import FfnScreen
from tui.widgets import panel
from tui.widgets.layer_table import LayerTable
from tui.widgets.text import count, number, percent
from tui.widgets.themes import GLYPH_RAMP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from textual.theme import Theme

    from tui.session.model import Browser
    from tui.session.place import Place
    from tui.widgets.lines import Line


class LayerTableScreen(FfnScreen):
    """FFNs with their mass, concentration and heat strip. Subclasses say which."""

    table: LayerTable

    def spans(self) -> Sequence[range]:
        """The rows, in model order."""
        raise NotImplementedError

    def on_mount(self) -> None:
        super().on_mount()
        self.app.theme_changed_signal.subscribe(self, self._theme_changed)
        # The legend counts the rows below those in sight.
        self.watch(self.table, "scroll_y", self.paint_legend, init=False)

    def _theme_changed(self, theme: Theme) -> None:
        self.table.set_ramp(self.atlas_app.ramp)
        self.paint()

    def show_browser(self) -> None:
        self.table.show(self.browser, self.spans(), self.ffn)

    def status_text(self) -> str:
        span = self.table.span
        ffn, summary = self.browser.snapshot.ffns[span[0]], self.browser.summary(span)
        measured = summary.concentration
        stack = f" {ffn.stack}" if self.browser.snapshot.several_stacks else ""
        expert = f" expert {ffn.expert}" if self.table.of_experts else ""
        counts = self.atlas_app.marks.counts
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
        label = f"share of {'expert' if self.table.of_experts else 'layer'} {self.browser.heading}  low "
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


class OverviewScreen(LayerTableScreen):
    """The model's FFNs."""

    SCREEN = "overview"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "layer", tooltip="open the layer"),
        *METRIC_BINDINGS,
        *COMMON_BINDINGS,
        Binding("q", "app.leave_program", "quit", show=False, tooltip="quit"),
        Binding("escape", "escape", "close", show=False, tooltip="close or clear"),
    ]

    def spans(self) -> Sequence[range]:
        return self.browser.snapshot.blocks

    def title_texts(self) -> tuple[str, str]:
        snapshot = self.browser.snapshot
        rows = "FFNs" if snapshot.several_stacks else "layers"
        experts = _extent([len(block) for block in snapshot.blocks]) + " experts × " if snapshot.has_experts else ""
        size = f"{len(snapshot.blocks)} {rows} × {experts}{_extent([ffn.n_channels for ffn in snapshot.ffns])} ch"
        partial = "" if snapshot.status == "complete" else f"{snapshot.status.upper()}: "
        left = f"{self.atlas_app.file_name}   {partial}{snapshot.model_id}   {size}   {snapshot.calibration_tokens:,} tokens"
        return left, f"{self.browser.heading}  overview"


class ExpertsScreen(LayerTableScreen):
    """The experts of one FFN."""

    SCREEN = "experts"
    FIND_HINT = "expert number"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "expert", tooltip="open the expert"),
        Binding("left_square_bracket", "neighbour(-1)", "layer", tooltip="previous layer with experts"),
        Binding("right_square_bracket", "neighbour(1)", "layer", tooltip="next layer with experts"),
        *METRIC_BINDINGS,
        *COMMON_BINDINGS,
        BACK_BINDING,
    ]

    def __init__(self, browser: Browser, ffn: int, ramp: tuple[str, ...]) -> None:
        super().__init__(LayerTable(browser, (), ramp, of_experts=True), ffn)

    def spans(self) -> Sequence[range]:
        return [range(ffn, ffn + 1) for ffn in self._block()]

    @property
    def place(self) -> Place:
        return replace(super().place, expert=self.browser.snapshot.ffns[self.ffn].expert)

    def _block(self) -> range:
        return self.browser.snapshot.block_around(self.ffn)

    def show_ffn(self, ffn: int) -> None:
        """Put the cursor on ``ffn``, and the experts of its layer around it."""
        if ffn not in self._block():
            self._to(ffn)
        super().show_ffn(ffn)

    def _to(self, ffn: int) -> None:
        block = self.browser.snapshot.block_around(ffn)
        self.table.show(self.browser, [range(expert, expert + 1) for expert in block], ffn)
        self.paint()

    def title_texts(self) -> tuple[str, str]:
        snapshot, block = self.browser.snapshot, self._block()
        ffn = snapshot.ffns[block[0]]
        stack = f" {ffn.stack}" if snapshot.several_stacks else ""
        left = f"{self.atlas_app.file_name} ▸ layer {ffn.layer_index}{stack}   {len(block)} experts × {ffn.n_channels:,} ch"
        return left, f"{self.browser.heading}  experts"

    def action_neighbour(self, step: int) -> None:
        blocks = self.browser.snapshot.blocks
        count = self.table.take_count() or 1
        here = self.browser.snapshot.block_of(self.ffn)
        others = [number for number in range(len(blocks)) if len(blocks[number]) > 1 and (number - here) * step > 0]
        if others:
            block = blocks[sorted(others, reverse=step < 0)[min(count, len(others)) - 1]]
            self._to(block[min(self.table.place, len(block) - 1)])


def _extent(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"
