"""Metric against metric over the channels of an FFN, in braille."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding, BindingType

from chanfmt.format import schema
from tui.screens.choice import ChoiceScreen
from tui.screens.keys import key_line, key_rows
from tui.screens.status import StatusScreen
from tui.session.scatter import make_scatter
from tui.widgets import plots
from tui.widgets.channel_table import LABEL_STYLES
from tui.widgets.lines import Line, Lines
from tui.widgets.text import number, spread

if TYPE_CHECKING:
    import numpy as np
    from textual.app import ComposeResult

    from tui.screens.layer import LayerScreen
    from tui.session.scatter import Scatter

AXIS = 9
"""Cells left of the plot."""
LETTERS = {schema.LABEL_HALO: "h", schema.LABEL_SUPERNODE: "S"}
"""What stands for a cell with such a channel where there are no colours."""


class ScatterScreen(StatusScreen):
    """Channels of the FFN of ``layer_screen``, which walks along."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("x", "choose('x')", "x", tooltip="choose the metric of the x axis"),
        Binding("m", "choose('y')", "y", tooltip="choose the metric of the y axis"),
        Binding("s", "swap", "swap", tooltip="swap the axes"),
        Binding("i", "axis", "log/rank", tooltip="log axes or ranks"),
        Binding("left_square_bracket,h,left", "neighbour(-1)", "layer", tooltip="previous layer"),
        Binding("right_square_bracket,l,right", "neighbour(1)", "layer", tooltip="next layer"),
        Binding("y", "copy", "copy", show=False, tooltip="copy the numbers"),
        Binding("q,escape", "back", "back", tooltip="back"),
    ]

    def __init__(self, layer: LayerScreen) -> None:
        super().__init__()
        self.layer_screen = layer
        metrics = list(layer.browser.snapshot.metrics)
        self.y = layer.browser.metric
        others = [name for name in ("activation_power", "lp", *metrics) if name in metrics and name != self.y]
        self.x = others[0] if others else self.y
        self.log_axes = True
        self._measured = ""

    def compose(self) -> ComposeResult:
        yield Lines(id="title")
        yield Lines(id="scatter")
        yield Lines(id="status")
        yield Lines(id="keys")

    def on_mount(self) -> None:
        self.call_after_refresh(self.paint)

    def show_browser(self) -> None:
        metrics = self.atlas_app.browser.snapshot.metrics
        self.x, self.y = (metric if metric in metrics else "lp" for metric in (self.x, self.y))
        self.paint()

    def show_marks(self) -> None:
        self.paint_status()

    def status_text(self) -> str:
        return self._measured

    @property
    def _about(self) -> str:
        snapshot = self.atlas_app.browser.snapshot
        name = snapshot.ffns[self.layer_screen.ffn].name(with_stack=snapshot.several_stacks)
        return f"{self.atlas_app.file_name} ▸ {name}   {self.y} against {self.x}"

    def paint(self) -> None:
        snapshot, ffn = self.atlas_app.browser.snapshot, self.layer_screen.ffn
        width = self.app.size.width
        self.lines("title").show([(spread(f" {self._about}", "scatter ", width), "")])
        scatter = make_scatter(snapshot.values(ffn, self.x), snapshot.values(ffn, self.y), snapshot.rho, log=self.log_axes)
        body = self.lines("scatter")
        body.show(*self._plot(scatter, snapshot.labels_of(ffn), width, body.size.height))
        self._measured = self._numbers(scatter)
        self.paint_status()
        self.lines("keys").show(key_line(key_rows(self), width))

    def _numbers(self, scatter: Scatter) -> str:
        left_out = f"   {scatter.left_out:,} not shown (zero or unknown)" if scatter.left_out else ""
        return (
            f"Spearman ρ {number(scatter.correlation)}   top {scatter.top:,} of both: {scatter.shared:,} shared, "
            f"Jaccard {number(scatter.jaccard)} (chance {number(scatter.chance, 2)}){left_out}"
        )

    def _plot(self, scatter: Scatter, labels: np.ndarray, width: int, height: int) -> list[Line]:
        cells, rows = width - AXIS - 2, height - 4
        if cells < 10 or rows < 2:
            return []
        dots, top = plots.braille_scatter(scatter.x, scatter.y, labels[scatter.channels], cells, rows)
        (x_low, x_high), (y_low, y_high) = scatter.ranges
        edges = {0: self._edge(y_high), rows - 1: self._edge(y_low)}
        lines: list[Line] = [[(f" {self.y}", "dim"), *self._legend()]]
        for row in range(rows):
            pieces = [(f"{edges.get(row, ''):>{AXIS}}┤", "dim")]
            for label, run in groupby(zip(top[row].tolist(), dots[row].tolist(), strict=True), key=lambda cell: cell[0]):
                letter = LETTERS.get(label) if self.atlas_app.colourless else None
                text = "".join(letter or plots.braille(bits) for _, bits in run)
                pieces.append((text, LABEL_STYLES.get(label, "")))
            lines.append(pieces)
        between = plots.decade_ticks(x_low, x_high, cells)[1:-1] if self.log_axes and x_high > x_low else []
        ticks = plots.axis_labels([(0.0, self._edge(x_low)), *between, (1.0, self._edge(x_high))], cells)
        return [
            *lines,
            [(" " * AXIS + "└" + "─" * cells, "dim")],
            [(" " * (AXIS + 1) + ticks, "dim")],
            [(f"{self.x:>{width - 2}}", "dim")],
        ]

    def _edge(self, value: float) -> str:
        return number(10.0**value) if self.log_axes else f"{value:,.0f}"

    def _legend(self) -> Line:
        if self.atlas_app.colourless:
            return [("    S supernode in the cell, h halo", "dim")]
        return [("    supernode", "super"), ("  halo", "halo"), ("  other", "")]

    def action_choose(self, axis: str) -> None:
        def chosen(metric: str | None) -> None:
            if metric is not None:
                setattr(self, axis, metric)
                self.paint()

        self.app.push_screen(ChoiceScreen(f"{axis} axis", self.atlas_app.metric_choices(), getattr(self, axis)), chosen)

    def action_swap(self) -> None:
        self.x, self.y = self.y, self.x
        self.paint()

    def action_axis(self) -> None:
        self.log_axes = not self.log_axes
        self.paint()

    def action_neighbour(self, step: int) -> None:
        self.layer_screen.action_neighbour(step)
        self.paint()

    def action_copy(self) -> None:
        self.atlas_app.copy(f"{self._about}   {self._measured}\n")
        self.say("copied")

    def action_back(self) -> None:
        self.app.pop_screen()
