"""One metric against another over the channels of an FFN, in braille, or as a picture where the terminal draws pixels."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding, BindingType
from textual.containers import Container

from chanfmt.format import schema
from tui.images import NEEDED
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

    from tui.screens.channels import Channels
    from tui.session.place import Opening, Place
    from tui.session.scatter import Scatter
    from tui.session.session import Session

AXIS = 9
"""Cells left of the plot."""
LETTERS = {schema.LABEL_HALO: "h", schema.LABEL_SUPERNODE: "S"}
"""Without colours, the letter of a cell that has a channel with this label."""


class ScatterScreen(StatusScreen):
    """Channels of the FFN of the screen below, which walks along."""

    SCREEN = "scatter"

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("x", "choose('x')", "x axis", tooltip="choose the x metric", id="x-metric"),
        Binding("m", "choose('y')", "y axis", tooltip="choose the y metric", id="y-metric"),
        Binding("s", "swap", "swap", tooltip="swap the axes", id="swap-axes"),
        Binding("i", "axis", "log/rank", tooltip="log axes or ranks", id="axis"),
        Binding("p", "picture", "picture", show=False, tooltip="picture or text", id="picture"),
        Binding("left_square_bracket,h", "neighbour(-1)", "layer", tooltip="previous layer", id="previous-layer"),
        Binding("left", "neighbour(-1)", "layer", tooltip="previous layer"),
        Binding("right_square_bracket,l", "neighbour(1)", "layer", tooltip="next layer", id="next-layer"),
        Binding("right", "neighbour(1)", "layer", tooltip="next layer"),
        Binding("y", "copy", "copy", show=False, tooltip="copy the numbers", id="copy"),
        Binding("q", "back", "back", tooltip="back", id="back"),
        Binding("escape", "back", "back", tooltip="back"),
    ]

    def __init__(self, session: Session, opening: Opening) -> None:
        super().__init__(session)
        self._channels: Channels = opening.below
        metrics = list(session.browser.snapshot.metrics)
        self.y = session.browser.metric
        others = [name for name in ("activation_power", "lp", *metrics) if name in metrics and name != self.y]
        self.x = others[0] if others else self.y
        self.log_axes = True
        self._as_picture = False
        self._measured = ""

    def compose(self) -> ComposeResult:
        yield Lines(id="title")
        yield Lines(id="scatter")
        yield Container(id="pictures")
        yield Lines(id="status")
        yield Lines(id="keys")

    def on_mount(self) -> None:
        self.call_after_refresh(self.paint)

    @property
    def ffn(self) -> int:
        return self._channels.ffn

    @property
    def place(self) -> Place:
        return replace(self._channels.place, screen=self.SCREEN)

    def show_browser(self) -> None:
        metrics, score = self.browser.snapshot.metrics, self.browser.snapshot.score
        self.x, self.y = (metric if metric in metrics else score for metric in (self.x, self.y))
        self.paint()

    def show_marks(self) -> None:
        self.paint_status()

    def status_text(self) -> str:
        return self._measured

    @property
    def _about(self) -> str:
        snapshot = self.browser.snapshot
        name = snapshot.ffns[self.ffn].name(with_stack=snapshot.several_stacks)
        return f"{self.session.file_name} ▸ {name}   {self.y} against {self.x}"

    def paint(self) -> None:
        snapshot, ffn = self.browser.snapshot, self.ffn
        width = self.app.size.width
        self.lines("title").show([(spread(f" {self._about}", "scatter ", width), "")])
        scatter = make_scatter(snapshot.values(ffn, self.x), snapshot.values(ffn, self.y), snapshot.rho, log=self.log_axes)
        body = self.lines("scatter")
        if self._as_picture:
            self._draw_picture()
        else:
            body.show(*self._plot(scatter, snapshot.labels_of(ffn), width, body.size.height))
        self._measured = self._numbers(scatter)
        self.paint_status()
        self.lines("keys").show(key_line(key_rows(self), width))

    def _numbers(self, scatter: Scatter) -> str:
        left_out = f"  {scatter.left_out:,} not shown (zero or unknown)" if scatter.left_out else ""
        return (
            f"Spearman ρ {number(scatter.correlation)}  top {scatter.top:,}: {scatter.shared:,} shared, "
            f"Jaccard {number(scatter.jaccard)}, by chance {number(scatter.chance, 2)}{left_out}"
        )

    def _plot(self, scatter: Scatter, labels: np.ndarray, width: int, height: int) -> list[Line]:
        cells, rows = width - AXIS - 2, height - 4
        if cells < 10 or rows < 2:
            return []
        dots, top = plots.braille_scatter(scatter.x, scatter.y, labels[scatter.channels], cells, rows)
        (x_low, x_high), (y_low, y_high) = scatter.ranges
        edges = {round((1 - place) * (rows - 1)): name for place, name in self._decades(y_low, y_high, 3 * rows)}
        edges |= {0: self._edge(y_high), rows - 1: self._edge(y_low)}
        lines: list[Line] = [[(f" {self.y}", "dim"), *self._legend()]]
        for row in range(rows):
            pieces = [(f"{edges.get(row, ''):>{AXIS}}┤", "dim")]
            for label, run in groupby(zip(top[row].tolist(), dots[row].tolist(), strict=True), key=lambda cell: cell[0]):
                letter = LETTERS.get(label) if self.front.colourless else None
                text = "".join(letter or plots.braille(bits) for _, bits in run)
                pieces.append((text, LABEL_STYLES.get(label, "")))
            lines.append(pieces)
        between = self._decades(x_low, x_high, cells)
        ticks = plots.axis_labels([(0.0, self._edge(x_low)), *between, (1.0, self._edge(x_high))], cells)
        return [
            *lines,
            [(" " * AXIS + "└" + "─" * cells, "dim")],
            [(" " * (AXIS + 1) + ticks, "dim")],
            [(f"{self.x:>{width - 2}}", "dim")],
        ]

    def _decades(self, low: float, high: float, cells: int) -> list[tuple[float, str]]:
        """Whole decades of an axis, without those that touch its ends."""
        ticks = plots.decade_ticks(low, high, cells) if self.log_axes and high > low else []
        return [tick for tick in ticks if 0.1 < tick[0] < 0.9]

    def _edge(self, value: float) -> str:
        return number(10.0**value) if self.log_axes else f"{value:.0f}"

    def _legend(self) -> Line:
        if self.front.colourless:
            return [("    S supernode in the cell, h halo", "dim")]
        return [("    supernode", "super"), ("  halo", "halo"), ("  other", "")]

    def action_choose(self, axis: str) -> None:
        def chosen(metric: str | None) -> None:
            if metric is not None:
                setattr(self, axis, metric)
                self.paint()

        self.front.ask(self.session.metric_question(getattr(self, axis), f"{axis} axis"), chosen)

    def action_swap(self) -> None:
        self.x, self.y = self.y, self.x
        self.paint()

    def action_axis(self) -> None:
        if self._as_picture:
            self.say("a picture has log axes")
            return
        self.log_axes = not self.log_axes
        self.paint()

    def action_neighbour(self, step: int) -> None:
        self._channels.action_neighbour(step)
        self.paint()

    def action_picture(self) -> None:
        if self._as_picture:
            self._as_text()
        elif self.front.picture_widget is None:
            self.say(NEEDED)
        else:
            self._as_picture = self.log_axes = True
            self.paint()

    def _as_text(self) -> None:
        self._as_picture = False
        self.query_one("#pictures").remove_children()
        self.query_one("#pictures").display = False
        self.lines("scatter").display = True
        self.call_after_refresh(self.paint)

    def _draw_picture(self) -> None:
        """Show the figure in place of the text as soon as it is drawn."""
        layers = [ffn.layer_index for ffn in self.browser.snapshot.ffns]
        if layers.count(layers[self.ffn]) > 1:
            self._as_text()
            self.say("a picture shows a whole layer, and this layer has several FFNs")
            return
        layer, x, y = self.browser.snapshot.ffns[self.ffn].layer_index, self.x, self.y
        size = (self.app.size.width, max(4, self.app.size.height - 3))

        def show(png: bytes) -> None:
            make = self.front.picture_widget
            if make is None or not self._as_picture or not self.is_attached:
                return
            box = self.query_one("#pictures")
            box.remove_children()
            box.mount(make(png))
            box.display = True
            self.lines("scatter").display = False

        self.say("drawing")
        self.session.pictures.scatter(layer, x, y, size, show)

    def action_copy(self) -> None:
        self.front.copy(f"{self._about}   {self._measured}\n")
        self.say("copied")

    def action_back(self) -> None:
        self.app.pop_screen()
