"""How the figures look: colours that the colour-blind tell apart, and a line style and a marker for each besides."""

from __future__ import annotations

from typing import Any

import numpy as np

# Okabe and Ito's colours, which differ in brightness too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
MARKERS = "osD^vPX"
GREY = "#767676"
DEPTH = "FFN, in model order"
"""Label of the horizontal axis of `by_depth`."""


def line_style(number: int) -> dict[str, Any]:
    """Colour, line style and marker of the ``number``-th line."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": STYLES[number % len(STYLES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def by_depth(axes: Any, depth: np.ndarray, values: np.ndarray, number: int, label: str) -> None:
    """A line over the FFNs in model order; of one with experts their median, and their range shaded."""
    places = np.unique(depth)
    rows = [values[(depth == place) & np.isfinite(values)] for place in places]
    known = [(place, row) for place, row in zip(places, rows, strict=True) if len(row)]
    if not known:
        return
    x = [place for place, _ in known]
    axes.plot(x, [float(np.median(row)) for _, row in known], label=label, **line_style(number))
    if any(len(row) > 1 for _, row in known):
        axes.fill_between(
            x,
            [row.min() for _, row in known],
            [row.max() for _, row in known],
            color=COLOURS[number % len(COLOURS)],
            alpha=0.15,
            linewidth=0,
        )


def share_axis(axes: Any) -> None:
    """A vertical axis of shares, from 0 in percent."""
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def log_axis(axes: Any, values: np.ndarray) -> None:
    """A logarithmic vertical axis where there is a positive value to show."""
    if (np.asarray(values)[np.isfinite(values)] > 0).any():
        axes.set_yscale("log")


def legend(axes: Any, **arguments: Any) -> None:
    """A legend, where anything was drawn."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**arguments)


def legend_below(figure: Any) -> None:
    """One legend for all axes, out of the way of their lines, where anything was drawn."""
    entries = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(4, len(entries)))
