"""Figures of channels: two metrics, a heat map, the overlap of two atlases, and measured losses against LP.

Every function draws arrays into matplotlib axes. Supernodes are amber, the halo is blue, and other channels are grey.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.analysis.strip import FLOOR, bin_edges
from chanfmt.format import schema
from chanfmt.reporting import drawing

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_POINTS = 20_000
"""Channels without a label that a scatter plot draws. Of more, every n-th is drawn."""
KINDS = {
    schema.LABEL_NONE: ("others", {"color": drawing.GREY, "s": 5, "alpha": 0.45, "linewidths": 0}),
    schema.LABEL_HALO: ("halo", {"color": drawing.HALO, "s": 9, "alpha": 0.7, "linewidths": 0}),
    schema.LABEL_SUPERNODE: (
        "supernodes",
        {"color": drawing.SUPERNODE, "s": 22, "edgecolors": "#000000", "linewidths": 0.4},
    ),
}
"""Label to its name in a legend, and to the look of its channels. Later kinds lie above earlier ones."""


def draw_scatter(axes: Any, x: np.ndarray, y: np.ndarray, labels: np.ndarray | None, names: tuple[str, str]) -> None:
    """Draw two metrics of channels into matplotlib ``axes``, with logarithmic scales.

    Channels for which one of the metrics is unknown or not positive have no place on such scales, and are left out.

    Args:
        x, y: The metrics, (channel,).
        labels: Labels, (channel,); None if they are not known.
        names: Names of the axes, with units.
    """
    shown = (x > 0) & (y > 0) & np.isfinite(x) & np.isfinite(y)
    for label, (name, look) in KINDS.items():
        chosen = np.flatnonzero(shown if labels is None else shown & (labels == label))
        if labels is None and label != schema.LABEL_NONE:
            continue
        if label == schema.LABEL_NONE:
            chosen = chosen[:: max(1, -(-len(chosen) // MOST_POINTS))]
        if len(chosen):
            axes.scatter(x[chosen], y[chosen], label=None if labels is None else name, rasterized=True, **look)
    if shown.any():
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    _label_legend(axes)


def draw_heat_map(axes: Any, shares: Sequence[np.ndarray], widths: Sequence[int], metric: str = "LP") -> None:
    """Draw how a metric is spread over the ranks of every layer into matplotlib ``axes``: a row for each unit.

    Args:
        shares: Mean share of the unit's mass in a channel, by rank in bins of a log axis (`strip_shares`), each (bin,).
        widths: Channels of each unit.
        metric: Name of the metric.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    # One scale for all rows, with the floor of the strips of the browser and of a report's page.
    floor = FLOOR / max(widths)
    norm = LogNorm(floor, 1.0)
    if len(set(widths)) == 1:
        edges = bin_edges(widths[0], len(shares[0]), log=True) + 1
        mesh = axes.pcolormesh(
            edges,
            np.arange(len(shares) + 1) - 0.5,
            np.maximum(np.stack(shares), floor),
            norm=norm,
            cmap="inferno",
            rasterized=True,
        )
    else:
        for row, (values, width) in enumerate(zip(shares, widths, strict=True)):
            edges = bin_edges(width, len(values), log=True) + 1
            mesh = axes.pcolormesh(
                edges, [row - 0.5, row + 0.5], np.maximum(values, floor)[np.newaxis], norm=norm, cmap="inferno", rasterized=True
            )
    axes.set_xscale("log")
    axes.set_xlim(1, max(widths) + 1)
    axes.set_ylim(len(shares) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    # A narrow FFN has no power of ten but 1 on its axis.
    narrow = max(widths) < 50
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if narrow and value in (2, 3, 5, 20) else "")
    axes.set_xlabel(f"rank of the channel by {metric}")
    axes.set_ylabel(drawing.DEPTH)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar = axes.figure.colorbar(mesh, ax=axes, label=f"share of the FFN's {metric} in one channel")
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")


def draw_agreement(axes: Any, depth: np.ndarray, jaccard: dict[str, np.ndarray], chance: dict[str, np.ndarray]) -> None:
    """Draw how far two atlases agree on supernodes and halo into matplotlib ``axes``, by depth.

    Args:
        depth: Place of each FFN in model order, (FFN,).
        jaccard: ``supernodes`` and ``halo`` to the Jaccard index of the two sets, (FFN,).
        chance: The same names to the index of random sets, (FFN,).
    """
    for number, (kind, colour) in enumerate((("supernodes", drawing.SUPERNODE), ("halo", drawing.HALO))):
        if np.isfinite(jaccard[kind]).any():
            drawing.by_depth(axes, depth, jaccard[kind], number, kind, colour)
            axes.plot(depth, chance[kind], color=colour, linestyle=":", linewidth=1, label=f"{kind}, by chance")
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("Jaccard index")
    drawing.depth_axis(axes)


def draw_ablation(
    axes: Any,
    lp: np.ndarray,
    change: np.ndarray,
    *,
    error: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    tokens: int | None = None,
) -> None:
    """Draw measured changes of the loss against LP into matplotlib ``axes``, with logarithmic scales.

    A channel whose removal lowers the loss is drawn hollow, at the size of the change.

    Args:
        lp: LP of each channel in nats^2, (channel,).
        change: Loss without the channel minus loss with it, in nats per token, (channel,).
        error: Standard error of ``change``, (channel,); None for no bars.
        labels: Labels, (channel,); None if they are not known.
        tokens: Tokens that the loss was measured on. With them, the figure shows what chance gives: sqrt(2 LP / tokens).
    """
    shown = (lp > 0) & np.isfinite(change) & (change != 0)
    size = np.abs(change)
    for label, (name, look) in KINDS.items():
        of_kind = shown if labels is None else shown & (labels == label)
        if not of_kind.any() or (labels is None and label != schema.LABEL_NONE):
            continue
        colour = look["color"]
        if error is not None:
            axes.errorbar(
                lp[of_kind], size[of_kind], yerr=error[of_kind], fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.5, zorder=1
            )
        rises = of_kind & (change > 0)
        axes.scatter(
            lp[of_kind],
            size[of_kind],
            # A single channel of an ablation is worth more ink than one of thousands in a scatter plot.
            s=26,
            facecolors=[colour if up else "none" for up in rises[of_kind]],
            edgecolors=colour,
            linewidths=1,
            zorder=3,
        )
        axes.plot([], [], marker="o", markersize=5, linestyle="", color=colour, label="channels" if labels is None else name)
    if (shown & (change < 0)).any():
        axes.plot(
            [], [], marker="o", markersize=5, linestyle="", color="#000000", fillstyle="none", label="hollow: the loss falls"
        )
    if shown.any():
        ends = np.array([lp[shown].min(), lp[shown].max()])
        axes.plot(ends, ends, color="#000000", linestyle="--", linewidth=1, label="change = LP")
        if tokens:
            line = np.geomspace(ends[0], ends[1], 32)
            axes.plot(line, np.sqrt(2 * line / tokens), color=drawing.GREY, linestyle=":", label="standard deviation by chance")
        axes.set_xscale("log")
        axes.set_yscale("log")
        # Bars that reach zero would stretch the scale without end.
        axes.set_ylim(bottom=min(size[shown].min(), ends[0]) / 2)
    axes.set_xlabel("LP, nats\N{SUPERSCRIPT TWO}")
    axes.set_ylabel("change of the loss, nats per token")


def _label_legend(axes: Any) -> None:
    """A legend with solid markers of one size."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        found = axes.legend(handles, names, scatterpoints=1, loc="best")
        for handle in found.legend_handles:
            handle.set_sizes([22])
            handle.set_alpha(1)
