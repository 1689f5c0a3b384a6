"""How much of the loss proxy lies in few channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra.labels import supernode_count
from chanfmt.analysis.mass import concentration, cumulative_share
from chanfmt.analysis.resample import middle
from chanfmt.reporting import drawing, paper
from chanfmt.reporting.section import NOT_COMPARABLE, Claim, Plot, Section, Table, above
from chanfmt.reporting.units import has_experts, name_columns
from chanfmt.reporting.words import bracketed, percent, times, with_interval

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chanfmt.format.unit import Unit

POINTS = 60
"""Points of a cumulative curve."""
RHO = 0.01
"""The paper's share of supernodes."""


def make(units: Sequence[Unit], rho: float) -> Section:
    """Make the section about concentration; ``rho`` is the atlas's share of supernodes."""
    measured = [concentration(unit.known("lp"), RHO) for unit in units]
    own = [concentration(unit.known("lp"), rho).top_share for unit in units]
    columns = name_columns(units)
    numbers = {
        name: np.array([getattr(item, name) for item in measured])
        for name in ("mass", "top_share", "max_over_mean", "effective_channels", "gini")
    }
    channels = np.array([len(unit.known("lp")) for unit in units])
    # In a narrow FFN, one channel is more than 1%.
    size = np.array([supernode_count(count, RHO) for count in channels.tolist()]) / channels
    numbers["top_channels"], numbers["top_over_even"] = size, numbers["top_share"] / size
    table = Table("concentration", columns | {"channels": channels, **numbers})
    curves, fractions = curves_of(units)
    curve_table = Table(
        "cumulative",
        {
            **{name: np.repeat(values, POINTS) for name, values in columns.items()},
            "fraction": np.tile(fractions, len(units)),
            "share": curves.ravel(),
        },
    )
    found = {name: middle(values, columns["ffn"]) for name, values in numbers.items()}
    top, peak, even = found["top_share"], found["max_over_mean"], found["top_over_even"]
    narrow = found["top_channels"].median > 2 * RHO
    name = f"top {percent(found['top_channels'].median)} of the channels (of few)" if narrow else "top 1% of the channels"
    claims = (
        Claim(
            "The top 1% of the channels carry most of a layer's LP",
            f"median {paper.TOP_SHARE:.1%}, layers {paper.TOP_SHARE_RANGE[0]:.1%} to {paper.TOP_SHARE_RANGE[1]:.1%} "
            f"({paper.MODEL})",
            f"median {with_interval(top, percent)}",
            NOT_COMPARABLE if narrow else above(top, 0.5),
            "the top 1% of the median FFN hold more than half; FFNs of 50 channels or more",
        ),
        Claim(
            "The top 1% hold many times their share",
            f"{paper.TOP_SHARE / RHO:.0f} times",
            f"{with_interval(even, times)} times",
            above(even, 10),
            "they hold more than ten times their share of the channels",
        ),
        Claim(
            "The largest channel is far above the mean",
            f"about {paper.MAX_OVER_MEAN:,.0f} times ({paper.MODEL})",
            f"{with_interval(peak, times)} times",
            above(peak, 100) if np.median(channels) >= 1000 else NOT_COMPARABLE,
            "it is more than a hundred times the mean in the median FFN; FFNs of 1,000 channels or more",
        ),
    )
    return Section(
        key="concentration",
        title="Concentration of the loss proxy",
        text=(
            f"In the median FFN the {name} hold {percent(top.median)} of the LP mass{bracketed(top, percent)}, "
            f"{times(even.median)} times their share of an evenly spread mass. The FFNs range from {percent(top.smallest)} to "
            f"{percent(top.largest)}. The largest channel has {times(peak.median)} times the mean. "
            f"{times(found['effective_channels'].median)} channels of equal LP would carry the same mass (n_eff), and the Gini "
            f"coefficient is {times(found['gini'].median)}.",
        ),
        numbers={
            "ffns": len(units),
            "top_share_median": top.median,
            "top_share_low": top.low,
            "top_share_high": top.high,
            "top_share_smallest": top.smallest,
            "top_share_largest": top.largest,
            "top_over_even_median": even.median,
            "max_over_mean_median": peak.median,
            "effective_channels_median": found["effective_channels"].median,
            "gini_median": found["gini"].median,
            "top_rho_share_median": middle(np.array(own)).median,
        },
        plots=(
            Plot(
                "concentration",
                f"Left: share of an FFN's LP mass in its {name}, by depth. Right: its largest channel over its mean"
                f"{'; the median and range of the experts' if has_experts(units) else ''}.",
                ("concentration",),
                (
                    lambda axes: draw_top_share(axes, {"here": (columns["ffn"], numbers["top_share"])}),
                    lambda axes: draw_largest(axes, {"here": (columns["ffn"], numbers["max_over_mean"])}),
                ),
                claims=claims,
                legend_below=True,
            ),
            Plot(
                "cumulative",
                "Share of the LP mass in an FFN's largest channels. Grey: FFNs, at most fifty; black: the median FFN; shaded: the "
                "middle half; dashed: an evenly spread mass.",
                ("cumulative",),
                (lambda axes: draw_curves(axes, fractions, curves),),
                (7.0, 3.6),
                claims[:1],
            ),
        ),
        tables=(table, curve_table),
        claims=claims,
    )


def curves_of(units: Sequence[Unit], metric: str = "lp") -> tuple[np.ndarray, np.ndarray]:
    """Share of the mass in the top fraction of the channels, (unit, point), and the fractions, evenly on a log axis."""
    fractions = np.geomspace(1 / max(unit.n_channels for unit in units), 1.0, POINTS)
    return np.stack([cumulative_share(unit.known(metric), fractions) for unit in units]), fractions


def draw_top_share(axes: Any, lines: drawing.Lines, metric: str = "LP", rho: float = RHO) -> None:
    """Draw the share of a metric in the top ``rho`` of the channels into matplotlib ``axes``, by depth.

    Args:
        lines: Name to the place and the share of each unit, both (unit,).
        metric: Name of the metric. The paper's line belongs to LP.
        rho: Share of the channels.
    """
    relative = drawing.lines_by_depth(axes, lines)
    if (metric, rho) == ("LP", RHO):
        drawing.paper_line(axes, paper.TOP_SHARE)
    drawing.share_axis(axes)
    axes.set_ylabel(f"share of {metric} in the top {100 * rho:g}%")
    drawing.depth_axis(axes, relative=relative)


def draw_largest(axes: Any, lines: drawing.Lines) -> None:
    """Draw the largest LP over the mean into matplotlib ``axes``, by depth.

    Args:
        lines: Name to the place and the ratio of each unit, both (unit,).
    """
    relative = drawing.lines_by_depth(axes, lines)
    drawing.paper_line(axes, paper.MAX_OVER_MEAN)
    drawing.log_axis(axes, np.concatenate([ratios for _, ratios in lines.values()]))
    axes.set_ylabel("largest LP over the mean")
    drawing.depth_axis(axes, relative=relative)


def draw_curves(axes: Any, fractions: np.ndarray, curves: np.ndarray, metric: str = "LP") -> None:
    """Draw the share of a metric's mass in the largest channels of one atlas into matplotlib ``axes``.

    Args:
        fractions: Shares of the channels, (point,), ascending.
        curves: Share of the mass in that share of the channels, (unit, point); units without mass are NaN.
        metric: Name of the metric. The paper's point belongs to LP.
    """
    known = curves[np.isfinite(curves).all(axis=1)]
    for curve in known[np.unique(np.linspace(0, max(0, len(known) - 1), 50).astype(int))] if len(known) else []:
        axes.plot(fractions, curve, color=drawing.GREY, linewidth=0.4, alpha=0.6)
    if len(known):
        low, middle_curve, high = np.quantile(known, [0.25, 0.5, 0.75], axis=0)
        axes.fill_between(fractions, low, high, color="#000000", alpha=0.15, linewidth=0)
        axes.plot(fractions, middle_curve, color="#000000", label="median FFN")
    _finish_curves(axes, fractions, metric)
    drawing.legend(axes, loc="upper left")


def draw_median_curves(axes: Any, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], metric: str = "LP") -> None:
    """Draw the share of a metric's mass in the largest channels into matplotlib ``axes``: the median FFN of each atlas.

    Args:
        curves: Name to the shares of the channels, (point,), ascending, and the shares of the mass, (unit, point).
        metric: Name of the metric. The paper's point belongs to LP.
    """
    for number, (name, (fractions, shares)) in enumerate(curves.items()):
        known = shares[np.isfinite(shares).all(axis=1)]
        if len(known):
            axes.plot(fractions, np.median(known, axis=0), label=name, **drawing.line_style(number) | {"marker": ""})
    # The widest FFN has the curve that begins first.
    _finish_curves(axes, min((fractions for fractions, _ in curves.values()), key=min), metric)


def _finish_curves(axes: Any, fractions: np.ndarray, metric: str) -> None:
    axes.plot(fractions, fractions, color=drawing.GREY, linestyle="--", label="spread evenly")
    axes.axvline(RHO, color=drawing.GREY, linestyle=":", linewidth=0.8)
    axes.annotate(" 1%", (RHO, 0.02), fontsize=8, color=drawing.GREY)
    if metric == "LP":
        drawing.paper_point(axes, RHO, paper.TOP_SHARE)
    axes.set_xscale("log")
    drawing.percent_ticks(axes)
    axes.set_xlabel(f"share of the channels, largest {metric} first")
    axes.set_ylabel(f"share of the {metric} mass")
    drawing.share_axis(axes)
