"""The look of the figures: each line has its own line style, marker and colour, and the colour-blind can tell the colours apart."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.reporting.section import Plot

Lines = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Name of a line to the place of each unit's FFN in model order, (unit,), and its value, (unit,)."""

# Okabe and Ito's colours, which differ in brightness, too. Amber is kept for supernodes, and a brown takes its place.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6F4E37", "#56B4E9", "#000000")
SUPERNODE, HALO = "#E69F00", "#0072B2"
"""Colours of supernodes and of the halo, wherever a figure shows channels by label."""
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
MARKERS = "osD^vPX"
GREY = "#767676"
"""Colour of everything that lines are compared with, and of channels without a label."""
LOOK: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "axes.titlesize": 9,
    "lines.markersize": 3.5,
    "lines.linewidth": 1.3,
}
"""Settings of matplotlib in which the figures are made."""
PAPER = "the paper, Llama-3.1-8B"
"""Label of `paper_line`."""
DEPTH = "FFN, in model order"
"""Label of the horizontal axis of `by_depth`."""


def line_style(number: int) -> dict[str, Any]:
    """Colour, line style and marker of the ``number``-th line."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": STYLES[number % len(STYLES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def by_depth(axes: Any, depth: np.ndarray, values: np.ndarray, number: int, label: str, colour: str | None = None) -> None:
    """Draw a line over the FFNs in model order. FFNs with experts show the median of the experts, and their range shaded.

    Args:
        depth: Place of each unit's FFN on the horizontal axis, (unit,).
        values: Value of each unit, (unit,).
        number: Number of the line in the figure, which gives its look.
        label: Name of the line.
        colour: Colour in place of the line's own.
    """
    style = line_style(number) | ({} if colour is None else {"color": colour})
    places = np.unique(depth)
    rows = [values[(depth == place) & np.isfinite(values)] for place in places]
    known = [(place, row) for place, row in zip(places, rows, strict=True) if len(row)]
    if not known:
        return
    x = [place for place, _ in known]
    axes.plot(x, [float(np.median(row)) for _, row in known], label=label, **style)
    if any(len(row) > 1 for _, row in known):
        axes.fill_between(
            x,
            [row.min() for _, row in known],
            [row.max() for _, row in known],
            color=style["color"],
            alpha=0.15,
            linewidth=0,
        )


def lines_by_depth(axes: Any, lines: Lines, colours: Sequence[str] = ()) -> bool:
    """Draw each line of ``lines`` by depth; ``colours`` are in place of their own colours.

    Atlases with different numbers of FFNs share an axis from 0, the first FFN, to 1, the last one.

    Returns:
        Whether the axis is of that kind.
    """
    ends = {int(depth.max()) for depth, _ in lines.values() if len(depth)}
    relative = len(ends) > 1
    for number, (name, (depth, values)) in enumerate(lines.items()):
        last = max(1, int(depth.max())) if relative and len(depth) else 1
        by_depth(axes, depth / last, values, number, name, colours[number] if colours else None)
    return relative


def paper_line(axes: Any, value: float, number: int | None = None) -> None:
    """Draw the paper's number into ``axes``, in the colour of the ``number``-th line, or in grey."""
    colour = GREY if number is None else COLOURS[number % len(COLOURS)]
    axes.axhline(value, color=colour, linestyle=(0, (1, 2)), linewidth=1.1, label=PAPER if number in (None, 0) else None)


def paper_point(axes: Any, x: float, y: float, label: str = PAPER) -> None:
    """Draw a point of the paper as a star."""
    axes.plot([x], [y], color="#000000", marker="*", markersize=9, linestyle="", label=label)


def heat_map(shares: np.ndarray) -> bytes:
    """A picture of ``shares``, float (row, column) in [0, 1], one pixel each, as PNG."""
    from matplotlib.image import imsave

    stream = io.BytesIO()
    # Without it the file would name the version of matplotlib.
    unnamed: Any = {"Software": None}
    imsave(stream, shares, cmap="inferno", vmin=0.0, vmax=1.0, format="png", metadata=unnamed)
    return stream.getvalue()


def depth_axis(axes: Any, *, relative: bool = False) -> None:
    """Label the horizontal axis of `by_depth`: with whole numbers, or as shares of the depth if it is ``relative``."""
    from matplotlib.ticker import MaxNLocator

    if relative:
        axes.set_xlabel(f"{DEPTH} (0: first, 1: last)")
        return
    axes.set_xlabel(DEPTH)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def share_axis(axes: Any) -> None:
    """Make the vertical axis show shares in percent, from 0."""
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def percent_ticks(axes: Any) -> None:
    """Make the logarithmic horizontal axis show shares in percent."""
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")


def log_axis(axes: Any, values: np.ndarray) -> None:
    """Make the vertical axis logarithmic if one of ``values`` is positive."""
    if (np.asarray(values)[np.isfinite(values)] > 0).any():
        axes.set_yscale("log")


def legend(axes: Any, **arguments: Any) -> None:
    """Add a legend if something with a label was drawn."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**arguments)


def legend_below(figure: Any) -> None:
    """Add one legend for all axes below them, if something with a label was drawn: in as many columns as fit, at most four."""
    entries = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    for columns in range(min(4, len(entries)), 0, -1):
        found = figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
        if columns == 1 or found.get_window_extent().width <= figure.bbox.width:
            return
        found.remove()


def draw_figure(plot: Plot, figure: Any) -> list[Any]:
    """Draw every panel of ``plot`` into ``figure``, which is empty. Returns the axes of the panels, from left to right."""
    panels = list(figure.subplots(1, len(plot.draw), squeeze=False)[0])
    for draw, axes in zip(plot.draw, panels, strict=True):
        draw(axes)
    if plot.legend_below:
        legend_below(figure)
    return panels


def draw_panels(plot: Plot, panels: Sequence[Any]) -> None:
    """Draw ``plot`` into axes of a figure of the caller's, one for each panel."""
    for draw, axes in zip(plot.draw, panels, strict=True):
        draw(axes)
    if plot.legend_below:
        legend(panels[-1])
