"""How much of the loss proxy lies in few channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra.labels import supernode_count
from chanfmt.analysis.mass import concentration
from chanfmt.analysis.resample import middle
from chanfmt.reporting import drawing, paper
from chanfmt.reporting.section import NOT_COMPARABLE, Claim, Plot, Section, Table, above
from chanfmt.reporting.units import has_experts, name_columns
from chanfmt.reporting.words import bracketed, percent, times, with_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    curves, fractions = _curves(units)
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
                    lambda axes: draw_top_share(axes, columns["ffn"], numbers["top_share"]),
                    lambda axes: draw_largest(axes, columns["ffn"], numbers["max_over_mean"]),
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


def _curves(units: Sequence[Unit]) -> tuple[np.ndarray, np.ndarray]:
    """Share of the mass in the top fraction of the channels, (unit, point), and the fractions, evenly on a log axis."""
    fractions = np.geomspace(1 / max(len(unit.values("lp")) for unit in units), 1.0, POINTS)
    curves = np.full((len(units), POINTS), np.nan)
    for row, unit in enumerate(units):
        values = np.sort(unit.known("lp").astype(np.float64))[::-1]
        total = values.sum()
        if total > 0:
            sums = np.concatenate([[0.0], np.cumsum(values)]) / total
            curves[row] = np.interp(fractions * len(values), np.arange(len(sums)), sums)
    return curves, fractions


def draw_top_share(axes: Any, depth: np.ndarray, shares: np.ndarray) -> None:
    """Draw the share of LP in the top 1% of the channels into matplotlib ``axes``, by depth.

    Args:
        depth: Place of each unit's FFN in model order, (unit,).
        shares: Share of each unit, (unit,).
    """
    drawing.by_depth(axes, depth, shares, 0, "here")
    drawing.paper_line(axes, paper.TOP_SHARE)
    drawing.share_axis(axes)
    axes.set_title("share of LP in the top 1%")
    drawing.depth_axis(axes)


def draw_largest(axes: Any, depth: np.ndarray, ratios: np.ndarray) -> None:
    """Draw the largest LP over the mean, ``ratios`` (unit,), into matplotlib ``axes``, by ``depth`` (unit,)."""
    drawing.by_depth(axes, depth, ratios, 0, "here")
    drawing.paper_line(axes, paper.MAX_OVER_MEAN)
    drawing.log_axis(axes, ratios)
    axes.set_title("largest LP over the mean")
    drawing.depth_axis(axes)


def draw_curves(axes: Any, fractions: np.ndarray, curves: np.ndarray) -> None:
    """Draw the share of the LP mass in the largest channels into matplotlib ``axes``.

    Args:
        fractions: Shares of the channels, (point,), ascending.
        curves: Share of the mass in that share of the channels, (unit, point); units without mass are NaN.
    """
    known = curves[np.isfinite(curves).all(axis=1)]
    for curve in known[np.unique(np.linspace(0, max(0, len(known) - 1), 50).astype(int))] if len(known) else []:
        axes.plot(fractions, curve, color=drawing.GREY, linewidth=0.4, alpha=0.6)
    if len(known):
        low, middle_curve, high = np.quantile(known, [0.25, 0.5, 0.75], axis=0)
        axes.fill_between(fractions, low, high, color="#000000", alpha=0.15, linewidth=0)
        axes.plot(fractions, middle_curve, color="#000000", label="median FFN")
    axes.plot(fractions, fractions, color=drawing.COLOURS[1], linestyle="--", label="spread evenly")
    axes.axvline(RHO, color=drawing.GREY, linestyle=":", linewidth=0.8)
    axes.annotate(" 1%", (RHO, 0.02), fontsize=8, color=drawing.GREY)
    drawing.paper_point(axes, RHO, paper.TOP_SHARE)
    axes.set_xscale("log")
    drawing.percent_ticks(axes)
    axes.set_xlabel("share of the channels, largest LP first")
    axes.set_ylabel("share of the LP mass")
    drawing.share_axis(axes)
    drawing.legend(axes, loc="upper left")
