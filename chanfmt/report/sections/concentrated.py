"""How much of the loss proxy sits in few channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.analysis.concentration import concentration
from chanfmt.analysis.resample import middle
from chanfmt.console import significant
from chanfmt.report import drawing, paper
from chanfmt.report.section import Claim, Plot, Section, Table
from chanfmt.report.units import name_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.report.units import Unit

POINTS = 60
"""Points of a cumulative curve."""
RHO = 0.01
"""The paper's share of supernodes."""


def make(units: Sequence[Unit], rho: float) -> Section:
    measured = [concentration(unit.known("lp"), RHO) for unit in units]
    own = [concentration(unit.known("lp"), rho).top_share for unit in units]
    columns = name_columns(units)
    numbers = {name: np.array([getattr(item, name) for item in measured])
               for name in ("mass", "top_share", "max_over_mean", "effective_channels", "gini")}
    channels = np.array([len(unit.values("lp")) for unit in units])
    table = Table("concentration", columns | {"channels": channels, **numbers})
    curves, fractions = _curves(units)
    curve_table = Table("cumulative", {
        **{name: np.repeat(values, POINTS) for name, values in columns.items()},
        "fraction": np.tile(fractions, len(units)), "share": curves.ravel(),
    })
    top, peak = middle(numbers["top_share"]), middle(numbers["max_over_mean"])
    return Section(
        key="concentration",
        title="Concentration of the loss proxy",
        text=(
            f"In the median FFN the top 1% of the channels hold {top.median:.1%} of the LP mass (bootstrap over FFNs "
            f"{top.low:.1%} to {top.high:.1%}; FFNs from {top.smallest:.1%} to {top.largest:.1%}), and the largest channel is "
            f"{significant(peak.median, 3)} times the mean.",
        ),
        numbers={
            "ffns": len(units), "top_share_median": top.median, "top_share_low": top.low, "top_share_high": top.high,
            "top_share_smallest": top.smallest, "top_share_largest": top.largest, "max_over_mean_median": peak.median,
            "effective_channels_median": middle(numbers["effective_channels"]).median,
            "gini_median": middle(numbers["gini"]).median, "top_rho_share_median": middle(np.array(own)).median,
        },
        plots=(
            Plot("concentration",
                 "Left: share of an FFN's LP mass in its top 1% of channels, by depth. Right: its largest channel over its mean. "
                 f"Of an FFN with experts: their median and range. The paper's {paper.MODEL} has a median of "
                 f"{paper.TOP_SHARE:.1%} ({paper.TOP_SHARE_RANGE[0]:.1%} to {paper.TOP_SHARE_RANGE[1]:.1%}) and about "
                 f"{paper.MAX_OVER_MEAN:,.0f}; here {top.median:.1%} and {significant(peak.median, 3)}.",
                 ("concentration",), lambda figure: _draw_depth(figure, columns["ffn"], numbers)),
            Plot("cumulative",
                 "Share of the LP mass in an FFN's largest channels. Grey: every FFN (of many, fifty). Black: the median, "
                 "shaded the middle half. Dashed: a mass spread evenly.",
                 ("cumulative",), lambda figure: _draw_curves(figure, fractions, curves), (5.0, 3.6)),
        ),
        tables=(table, curve_table),
        claims=(
            Claim("The top 1% of the channels carry most of a layer's LP",
                  f"median {paper.TOP_SHARE:.1%}, layers {paper.TOP_SHARE_RANGE[0]:.1%} to {paper.TOP_SHARE_RANGE[1]:.1%} "
                  f"({paper.MODEL})", f"median {top.median:.1%}", bool(top.median > 0.5),
                  "the median FFN's top 1% hold over half"),
            Claim("The top 1% hold many times their share", f"{paper.TOP_SHARE / RHO:.0f} times", f"{top.median / RHO:.0f} times",
                  bool(top.median > 10 * RHO), "over ten times their share of the channels"),
            Claim("The largest channel is far above the mean", f"about {paper.MAX_OVER_MEAN:,.0f} times ({paper.MODEL})",
                  f"{significant(peak.median, 3)} times", bool(peak.median > 100), "over a hundred times in the median FFN"),
        ),
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


def _draw_depth(figure: Any, depth: np.ndarray, numbers: dict[str, np.ndarray]) -> None:
    left, right = figure.subplots(1, 2)
    drawing.by_depth(left, depth, numbers["top_share"], 0, "top 1%")
    drawing.share_axis(left)
    left.set_title("share of LP in the top 1%")
    drawing.by_depth(right, depth, numbers["max_over_mean"], 1, "largest / mean")
    drawing.log_axis(right, numbers["max_over_mean"])
    right.set_title("largest LP over the mean")
    for axes in (left, right):
        axes.set_xlabel("FFN, in model order")


def _draw_curves(figure: Any, fractions: np.ndarray, curves: np.ndarray) -> None:
    axes = figure.subplots()
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
    axes.set_xscale("log")
    axes.set_xlabel("share of the channels, largest LP first")
    axes.set_ylabel("share of the LP mass")
    drawing.share_axis(axes)
    drawing.legend(axes, loc="upper left")
