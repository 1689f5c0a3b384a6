"""Figures of atlases, for notebooks and papers.

Every function draws one figure. ``ax`` is a matplotlib axes to draw into; without it, the function makes a new figure. The
function returns the axes, so that you can change a title or save the figure: ``chanfmt.plot.heat_map(atlas).figure.savefig("a.png")``.

An atlas is an open `Atlas`, a path, or ``hf://REPO/FILE``. Functions of several atlases take one atlas, a list, or a dictionary
from names to atlases; the names are in the legend. Supernodes are amber in every figure, the halo is blue, and other channels are
grey.

| function | figure |
|---|---|
| `concentration` | share of a metric in the top channels, by depth: a line for each atlas |
| `cumulative` | share of a metric in the largest channels, median FFN: a curve for each atlas |
| `scatter` | two metrics of the channels, log-log, coloured by label |
| `heat_map` | layers x ranks: share of the layer's LP in a channel |
| `overlap` | how far two atlases agree on supernodes and halo, by depth |
| `trajectory` | when the supernodes of the last checkpoint appear |
| `ablation` | measured changes of the loss against LP |
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra.compare import compare, medians, rank_correlation
from chanfmt.analysis.mass import concentration as concentration_of
from chanfmt.analysis.strip import strip_shares
from chanfmt.base.errors import AtlasError, MissingPackageError, UsageError
from chanfmt.base.text import one_line
from chanfmt.hub.locate import opened
from chanfmt.reporting import drawing, figures
from chanfmt.reporting.explore import BINS, MOST_UNITS
from chanfmt.reporting.names import named_atlases, short_names
from chanfmt.reporting.sections import concentrated
from chanfmt.reporting.trajectory import make_trajectory
from chanfmt.reporting.units import find_units
from chanfmt.reporting.words import times

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from chanfmt.format.reader import Atlas
    from chanfmt.format.unit import Unit

    Given = Atlas | str | os.PathLike[str]
    Several = Given | Sequence[Given] | Mapping[str, Given]

__all__ = ["ablation", "concentration", "cumulative", "heat_map", "overlap", "scatter", "trajectory"]


_UNITS = {"nats2": "nats\N{SUPERSCRIPT TWO}"}
"""CF units as a figure shows them."""


def concentration(atlases: Several, metric: str = "lp", rho: float = 0.01, *, ax: Any = None) -> Any:
    """Draw the share of ``metric`` in the top ``rho`` of the channels of every FFN, by depth.

    FFNs with experts show the median of the experts, and their range shaded. If the atlases have different numbers of FFNs, the
    axis goes from 0, the first FFN, to 1, the last one. A dotted line is the paper's median for LP.

    Args:
        atlases: One atlas, a list, or a dictionary from names to atlases.
        metric: A metric of the atlases.
        rho: Share of the channels.

    Returns:
        The axes.

    Raises:
        AtlasError: An atlas does not hold ``metric``.
        MissingPackageError: matplotlib is not installed (``pip install 'chanfmt[plot]'``).
    """
    lines = {}
    for name, atlas in _each(atlases):
        units = _units(atlas, metric)
        shares = [concentration_of(unit.known(metric), rho).top_share for unit in units]
        lines[name] = (np.array([unit.index for unit in units]), np.array(shares))

    return _draw(ax, lambda axes: concentrated.draw_top_share(axes, lines, _word(metric), rho), legend=True)


def cumulative(atlases: Several, metric: str = "lp", *, ax: Any = None) -> Any:
    """Draw the share of ``metric`` in the largest channels, against their share of the channels.

    One atlas shows its FFNs, the middle half of them, and the median FFN. Several atlases show their median FFNs.

    Args:
        atlases, metric: As for `concentration`.

    Returns:
        The axes.

    Raises:
        AtlasError, MissingPackageError: As for `concentration`.
    """
    curves = {}
    for name, atlas in _each(atlases):
        shares, fractions = concentrated.curves_of(_units(atlas, metric), metric)
        curves[name] = (fractions, shares)
    if len(curves) == 1:
        [(fractions, shares)] = curves.values()
        return _draw(ax, lambda axes: concentrated.draw_curves(axes, fractions, shares, _word(metric)))
    return _draw(ax, lambda axes: concentrated.draw_median_curves(axes, curves, _word(metric)), legend=True)


def scatter(atlas: Given, x: str = "lp", y: str = "activation_power", layer: int | None = None, *, ax: Any = None) -> Any:
    """Draw two metrics of the channels against each other, log-log, coloured by label.

    The title gives Spearman's correlation over the channels of an FFN, the median over FFNs.

    Args:
        atlas: The atlas.
        x, y: The metrics. Channels with a value that is unknown or not positive are left out.
        layer: Layer whose channels are drawn; None for all layers. Of many channels without a label, some are drawn.

    Returns:
        The axes.

    Raises:
        UsageError: The atlas has no such layer.
        AtlasError: The atlas does not hold one of the metrics.
        MissingPackageError: matplotlib is not installed.
    """
    with opened(atlas) as held:
        units = [unit for unit in _units(held, x, y) if layer in (None, unit.layer)]
        if not units:
            raise UsageError(f"{held.path} has no layer {layer}", hint=f"see: atlas info {held.path}")
        values = {name: [unit.values(name) for unit in units] for name in (x, y)}
        labels = np.concatenate([unit.labels for unit in units]) if all(unit.holds("label") for unit in units) else None
        axis_names = (_axis_name(units[0], x), _axis_name(units[0], y))
        where = "all layers" if layer is None else f"layer {layer}"
    correlations = [rank_correlation(first, second) for first, second in zip(*values.values(), strict=True)] if x != y else [1.0]
    known = [value for value in correlations if np.isfinite(value)]
    title = f"{where}: Spearman {times(float(np.median(known)))}" if known else where

    def draw(axes: Any) -> None:
        figures.draw_scatter(axes, np.concatenate(values[x]), np.concatenate(values[y]), labels, axis_names)
        axes.set_title(title + (" (median FFN)" if len(known) > 1 else ""))

    return _draw(ax, draw, (5.0, 4.0))


def heat_map(atlas: Given, metric: str = "lp", *, ax: Any = None) -> Any:
    """Draw layers x ranks: the share of an FFN's ``metric`` in one channel, on log axes. A colour bar explains the colours.

    Each FFN, or each expert, is a row. Of more than 160 rows, some are drawn, evenly spaced.

    Args:
        atlas: The atlas.
        metric: A metric of the atlas that is not negative.

    Returns:
        The axes of the map.

    Raises:
        AtlasError: The atlas does not hold ``metric``.
        MissingPackageError: matplotlib is not installed.
    """
    with opened(atlas) as held:
        units = _units(held, metric)
        chosen = [units[place] for place in np.unique(np.linspace(0, len(units) - 1, MOST_UNITS).round().astype(int))]
        shares = [strip_shares(unit.values(metric), BINS, log=True) for unit in chosen]
        widths = [unit.n_channels for unit in chosen]
    return _draw(ax, lambda axes: figures.draw_heat_map(axes, shares, widths, _word(metric)), (6.0, 4.0))


def overlap(first: Given, second: Given, metric: str = "lp", *, ax: Any = None) -> Any:
    """Draw how far two atlases of one architecture agree on supernodes and halo: Jaccard indices by depth, with their chances.

    The title names both atlases, and gives Spearman's correlation of ``metric`` in the median FFN.

    Args:
        first, second: The atlases.
        metric: Metric whose ranks are compared.

    Returns:
        The axes.

    Raises:
        AtlasError: The FFNs differ, or an atlas lacks the metric or labels.
        MissingPackageError: matplotlib is not installed.
    """
    with opened(first) as one, opened(second) as other:
        rows = compare(one, other, metric)
        names = short_names([one, other])
    numbers = {
        kind: (
            np.array([getattr(row, f"{field}_jaccard") for row in rows]),
            np.array([getattr(row, f"{field}_chance") for row in rows]),
        )
        for kind, field in (("supernodes", "supernode"), ("halo", "halo"))
    }
    correlation = times(medians(rows)["correlation"])

    def draw(axes: Any) -> None:
        jaccard, chance = ({kind: pair[place] for kind, pair in numbers.items()} for place in (0, 1))
        figures.draw_agreement(axes, np.arange(len(rows)), jaccard, chance)
        axes.set_title(f"{names[0]} and {names[1]}: Spearman of {_word(metric)} {correlation} (median FFN)")

    return _draw(ax, draw, legend=True)


def trajectory(atlases: Sequence[Given] | Mapping[str, Given], *, ax: Any = None) -> Any:
    """Draw when the supernodes of the last checkpoint appear: Jaccard indices with the last and the first checkpoint.

    The axis shows training steps if all revisions, or all names of models or files, contain one.

    Args:
        atlases: Atlases of one model's checkpoints in order of training: a list, or a dictionary from names to atlases.

    Returns:
        The axes.

    Raises:
        UsageError: Fewer than two atlases.
        AtlasError: The models have different FFNs, or an atlas holds no measured LP.
        MissingPackageError: matplotlib is not installed.
    """
    with contextlib.ExitStack() as stack:
        held = {name: stack.enter_context(opened(atlas)) for name, atlas in named_atlases(atlases).items()}
        report = make_trajectory(list(held.values()), list(held))
    return _draw(ax, report.plots["overlap"].draw[0])


def ablation(
    lp: Any,
    change: Any,
    *,
    error: Any = None,
    labels: Any = None,
    tokens: int | None = None,
    ax: Any = None,
) -> Any:
    """Draw what the removal of single channels cost against their LP, log-log.

    If LP predicted the cost, the points would lie on the dashed line. A channel whose removal lowers the loss is hollow.
    `surgery.ablate("channels", ...)` measures such changes: its rows hold ``lp``, ``delta_nll`` and ``tokens``.

    Args:
        lp: LP of each channel in nats^2, (channel,).
        change: Loss without the channel minus loss with it, in nats per token, (channel,).
        error: Standard error of ``change``, (channel,).
        labels: Label of each channel: 0 none, 1 halo, 2 supernode, (channel,).
        tokens: Tokens that the loss was measured on. With them, a dotted line shows what chance gives.

    Returns:
        The axes.

    Raises:
        UsageError: The arrays have different lengths.
        MissingPackageError: matplotlib is not installed.
    """
    given = {"lp": lp, "change": change, "error": error, "labels": labels}
    arrays = {name: np.asarray(values) for name, values in given.items() if values is not None}
    if len({array.shape for array in arrays.values()}) > 1 or arrays["lp"].ndim != 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise UsageError(f"the arrays have different shapes: {shapes}", hint="pass one value per channel")
    return _draw(
        ax,
        lambda axes: figures.draw_ablation(
            axes, arrays["lp"], arrays["change"], error=arrays.get("error"), labels=arrays.get("labels"), tokens=tokens
        ),
        (6.8, 4.4),
        legend=True,
    )


def _draw(ax: Any, draw: Callable[[Any], None], size: tuple[float, float] = (6.0, 3.4), *, legend: bool = False) -> Any:
    """Let ``draw`` draw into ``ax``, or into the axes of a new figure of ``size`` inches. Returns the axes.

    With ``legend``, the lines get a legend: below the axes of a new figure, and inside of axes that were given.
    """
    try:
        import matplotlib as mpl
        from matplotlib import pyplot
    except ImportError:
        raise MissingPackageError("matplotlib", "plot", "a figure") from None
    if ax is not None:
        draw(ax)
        if legend:
            drawing.legend(ax)
        return ax
    with mpl.rc_context(drawing.LOOK):
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        draw(axes)
        if legend:
            drawing.legend_below(figure)
    return axes


def _each(atlases: Several) -> Iterator[tuple[str, Atlas]]:
    """Open every atlas in turn."""
    for name, atlas in named_atlases(atlases).items():
        with opened(atlas) as held:
            yield one_line(name), held


def _units(atlas: Atlas, *metrics: str) -> list[Unit]:
    """The units that hold all ``metrics``, with a known value. Raises `AtlasError` if there is none."""
    if metrics == ("lp",):
        units, _ = find_units(atlas)
    else:
        units = [unit for unit in atlas.units() if all(unit.holds(name) and len(unit.known(name)) for name in metrics)]
    if not units:
        held = dict.fromkeys(metric.name for stack in atlas.stacks.values() for metric in stack.all_metrics)
        raise AtlasError(f"{atlas.path} holds no {' and '.join(metrics)}", hint=f"metrics it holds: {', '.join(held)}")
    return units


def _word(metric: str) -> str:
    return "LP" if metric == "lp" else metric


def _axis_name(unit: Unit, metric: str) -> str:
    """Name of an axis: the metric with its unit."""
    variable = next((item for item in unit.stack.all_metrics if item.name == metric), None)
    units = "1" if variable is None else variable.units
    return _word(metric) + ("" if units in ("", "1") else f", {_UNITS.get(units, units)}")
