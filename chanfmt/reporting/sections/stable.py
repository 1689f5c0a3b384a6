"""Whether other calibration text of the same kind would give the same supernodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.analysis.resample import middle
from chanfmt.analysis.splits import stability
from chanfmt.reporting import drawing, paper
from chanfmt.reporting.section import Plot, Section, Table
from chanfmt.reporting.units import name_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chanfmt.analysis.resample import Middle
    from chanfmt.format.unit import Unit

NAMES = ("top_share", "top_share_error", "top_share_low", "top_share_high", "leave_one_out", "persistence", "chance")


def make(units: Sequence[Unit], rho: float, advance: Callable[[], object]) -> Section:
    """Make the section about stability; ``advance`` is called after every unit."""
    title = "Stability of the supernodes"
    found, kept = [], []
    for unit in units:
        advance()
        if not (unit.holds("sum_q2_split") and unit.holds("tokens_split")):
            continue
        item = stability(unit.by_split("sum_q2_split"), unit.by_split("tokens_split"), rho)
        if item is not None:
            found.append(item)
            kept.append(unit)
    if not found:
        return Section(
            "stability",
            title,
            missing=(
                "no sums of several splits in this atlas: atlas strip drops these sums, and a text of one sequence has one split",
            ),
        )
    columns = name_columns(kept)
    numbers = {name: np.array([getattr(item, name) for item in found]) for name in NAMES}
    sizes = sorted({place for item in found for place in range(len(item.by_tokens))})
    by_tokens = [[item.by_tokens[place] for item in found if len(item.by_tokens) > place] for place in sizes]
    curve = [
        (
            float(np.median([row.tokens for row in rows])),
            middle(np.array([row.jaccard for row in rows]), columns["ffn"][[len(item.by_tokens) > place for item in found]]),
        )
        for place, rows in zip(sizes, by_tokens, strict=True)
    ]
    chance = middle(numbers["chance"]).median
    steady = middle(np.array([item.core / item.supernodes for item in found])).median
    persistence, left_out = middle(numbers["persistence"]).median, middle(numbers["leave_one_out"]).median
    most = curve[-1]
    return Section(
        key="stability",
        title=title,
        text=(
            f"Two disjoint parts of this text, of about {most[0]:,.0f} tokens each, agree on the supernodes with a Jaccard index "
            f"of {most[1].median:.1%} in the median FFN (by chance {chance:.1%}). On average, a supernode stays a supernode in "
            f"{persistence:.1%} of the bootstrap samples of the splits, and {steady:.1%} of the supernodes stay in at least 95%. "
            f"If one of the splits is left out, the sets have a mean Jaccard index of {left_out:.1%}.",
            f"Splits are parts of one calibration text. Text of another kind may change more. {paper.DOMAINS} To compare "
            "atlases of several texts, use: atlas compare.",
        ),
        numbers={
            "persistence_median": persistence,
            "leave_one_out_median": left_out,
            "steady_share_median": steady,
            "halves_tokens": most[0],
            "halves_jaccard_median": most[1].median,
            "halves_jaccard_low": most[1].low,
            "halves_jaccard_high": most[1].high,
            "jaccard_chance": chance,
        },
        plots=(
            Plot(
                "stability",
                f"Left: share of LP in the supernodes by depth, {_bars(columns['ffn'])}. Right: Jaccard index of the supernodes of "
                "two disjoint parts of the text against their tokens, median FFN with its bootstrap interval; grey: by chance. "
                f"{paper.DOMAINS}",
                ("stability", "stability-by-tokens"),
                (
                    lambda axes: draw_shares(axes, columns["ffn"], numbers),
                    lambda axes: draw_agreement(axes, curve, chance),
                ),
            ),
        ),
        tables=(
            Table(
                "stability",
                columns
                | numbers
                | {
                    "supernodes": np.array([item.supernodes for item in found]),
                    "steady": np.array([item.core for item in found]),
                },
            ),
            Table(
                "stability-by-tokens",
                {
                    "tokens": np.array([tokens for tokens, _ in curve]),
                    "jaccard_median": np.array([item.median for _, item in curve]),
                    "jaccard_low": np.array([item.low for _, item in curve]),
                    "jaccard_high": np.array([item.high for _, item in curve]),
                    "chance": np.full(len(curve), chance),
                },
            ),
        ),
    )


def _bars(depth: np.ndarray) -> str:
    return (
        "with the bootstrap interval over splits as bars"
        if len(np.unique(depth)) == len(depth)
        else "with the median and range of the experts"
    )


def draw_shares(axes: Any, depth: np.ndarray, numbers: dict[str, np.ndarray]) -> None:
    """Draw the share of LP in the supernodes with its bootstrap interval into matplotlib ``axes``, by depth.

    Args:
        depth: Place of each unit's FFN in model order, (unit,).
        numbers: ``top_share``, ``top_share_low`` and ``top_share_high`` of each unit, (unit,).
    """
    share = numbers["top_share"]
    if len(np.unique(depth)) == len(depth):
        errors = np.abs(np.stack([share - numbers["top_share_low"], numbers["top_share_high"] - share]))
        axes.errorbar(depth, share, yerr=errors, fmt="o", color=drawing.SUPERNODE, elinewidth=0.8, capsize=1.5)
    else:
        drawing.by_depth(axes, depth, share, 0, "top share", drawing.SUPERNODE)
    drawing.share_axis(axes)
    drawing.depth_axis(axes)
    axes.set_title("share of LP in the supernodes")


def draw_agreement(axes: Any, curve: Sequence[tuple[float, Middle]], chance: float) -> None:
    """Draw the Jaccard index of the supernodes of disjoint parts of the text into matplotlib ``axes``.

    Args:
        curve: Tokens in each part, and the index over FFNs.
        chance: Index of random sets.
    """
    tokens = [place for place, _ in curve]
    medians = np.array([item.median for _, item in curve])
    low, high = (np.array([getattr(item, name) for _, item in curve]) for name in ("low", "high"))
    errors = np.nan_to_num(np.abs(np.stack([medians - low, high - medians])))
    axes.errorbar(tokens, medians, yerr=errors, marker="o", color=drawing.COLOURS[0], capsize=2)
    axes.axhline(chance, color=drawing.GREY, linestyle=":", label="by chance")
    axes.set_xscale("log")
    axes.set_xticks(tokens, [f"{place:,.0f}" for place in tokens])
    axes.minorticks_off()
    axes.set_ylim(0, 1)
    axes.set_xlabel("tokens in each part")
    axes.set_title("Jaccard of disjoint parts")
    drawing.legend(axes)
