"""Whether cheaper metrics than LP find the same channels: activations, norms of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra.compare import rank_correlation
from chanfmt.analysis.association import top_overlap
from chanfmt.analysis.resample import middle
from chanfmt.reporting import drawing, paper
from chanfmt.reporting.section import Claim, Plot, Section, Table, below, worst
from chanfmt.reporting.units import name_columns
from chanfmt.reporting.words import listed, percent, times, with_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.analysis.resample import Middle
    from chanfmt.format.unit import Unit

TITLE = "LP against activations and weights"
NORMS = ("write_norm", "up_norm", "gate_norm")
CONTROLS = ("activation_power", "taylor", *NORMS)
RHOS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
"""Sizes of the top sets that are compared, as shares of the channels."""


def make(units: Sequence[Unit]) -> Section:
    """Make the section that compares LP with cheaper metrics."""
    correlation = {name: np.full(len(units), np.nan) for name in CONTROLS}
    jaccard = {name: np.full((len(RHOS), len(units)), np.nan) for name in CONTROLS}
    chance = np.full((len(RHOS), len(units)), np.nan)
    size = np.full((len(RHOS), len(units)), np.nan)
    for place, unit in enumerate(units):
        lp = unit.values("lp")
        for name in CONTROLS:
            if not unit.holds(name):
                continue
            values = unit.values(name)
            correlation[name][place] = rank_correlation(lp, values)
            known = int((np.isfinite(lp) & np.isfinite(values)).sum())
            for row, rho in enumerate(RHOS):
                overlap = top_overlap(lp, values, rho)
                jaccard[name][row, place], chance[row, place] = overlap.jaccard, overlap.chance
                size[row, place] = overlap.size / known if known else np.nan
    columns = name_columns(units)
    spearman = {name: middle(values, columns["ffn"]) for name, values in correlation.items()}
    held = [name for name in CONTROLS if spearman[name].count]
    missing = tuple(f"no {name} in this atlas" for name in CONTROLS if name not in held)
    if not held:
        return Section("controls", TITLE, missing=missing)
    overlaps = {name: [middle(row, columns["ffn"]) for row in jaccard[name]] for name in held}
    by_chance = [middle(row).median for row in chance]
    sizes = [middle(row).median for row in size]
    one = RHOS.index(0.01)
    sweep = Table(
        "overlap",
        {
            "metric": np.repeat(held, len(RHOS)),
            "rho": np.tile(RHOS, len(held)),
            "share_of_channels": np.tile(sizes, len(held)),
            **{
                f"jaccard_{part}": np.array([getattr(item, part) for name in held for item in overlaps[name]])
                for part in ("median", "low", "high")
            },
            "chance": np.tile(by_chance, len(held)),
        },
    )
    norms = {name: middle(np.abs(correlation[name]), columns["ffn"]) for name in NORMS if name in held}
    text = [f"Spearman's correlation with LP over the channels of an FFN has these medians: {listed(spearman.items(), times)}."]
    of_sets, of_ranks = [], []
    if "activation_power" in held:
        power, ranks = overlaps["activation_power"][one], spearman["activation_power"]
        shared = 2 * power.median / (1 + power.median)
        text.append(
            f"The sets of the top {percent(sizes[one])} by LP and by activation power have a median Jaccard index of "
            f"{percent(power.median)} ({percent(by_chance[one])} by chance): about {percent(shared)} of each is in the other."
        )
        of_sets.append(
            Claim(
                "LP and activation power choose different channels",
                f"Jaccard {paper.ACTIVATION_JACCARD:.1%} ({paper.MODEL})",
                f"Jaccard {with_interval(power, percent)}",
                below(power, 1 / 3),
                "less than half of each set is in the other set: the Jaccard index is below a third",
            )
        )
        of_ranks.append(
            Claim(
                "LP and activation power rank the channels differently",
                f"Spearman {paper.SPEARMAN['activation_power']:g} ({paper.MODEL})",
                f"Spearman {with_interval(ranks, times)}",
                below(ranks, 0.5),
                "Spearman's correlation is below 0.5 in the median FFN",
            )
        )
    if norms:
        ranges = ", ".join(f"{name} {times(spearman[name].smallest)} to {times(spearman[name].largest)}" for name in norms)
        text.append(
            f"The correlation with the norms of weights ranges over the FFNs as follows: {ranges}. The median of its size, "
            f"without the sign, is: {listed(norms.items(), times)}."
        )
        of_ranks.append(
            Claim(
                "LP measures something else than the norms of weights",
                ", ".join(f"{name} {paper.SPEARMAN[name]:g}" for name in NORMS) + f" ({paper.MODEL}; medians with their signs)",
                ", ".join(
                    f"{name} {times(spearman[name].median)}, without sign {with_interval(item, times)}"
                    for name, item in norms.items()
                ),
                worst(below(item, 0.3) for item in norms.values()),
                "the size of each correlation is below 0.3 in the median FFN",
            )
        )
    return Section(
        key="controls",
        title=TITLE,
        text=tuple(text),
        numbers={
            **{f"spearman_{name}_median": spearman[name].median for name in held},
            **{f"spearman_{name}_size_median": item.median for name, item in norms.items()},
            **{f"jaccard_{name}_at_1_percent": overlaps[name][one].median for name in held},
            "jaccard_chance": by_chance[one],
        },
        plots=(
            Plot(
                "spearman",
                "Spearman's correlation of LP with other metrics over an FFN's channels, by depth; dotted: the paper's medians. "
                f"Medians here: {listed(spearman.items(), times)}.",
                ("spearman",),
                (lambda axes: draw_correlation(axes, columns["ffn"], {name: correlation[name] for name in held}),),
                claims=tuple(of_ranks),
                legend_below=True,
            ),
            Plot(
                "overlap",
                "Jaccard index of the top set by LP with the top set by each other metric, against the size of the sets; median "
                "over FFNs. Grey: sets drawn at random.",
                ("overlap",),
                (lambda axes: draw_overlap(axes, sizes, overlaps, by_chance),),
                (7.0, 3.6),
                tuple(of_sets),
                legend_below=True,
            ),
        ),
        tables=(Table("spearman", columns | {name: correlation[name] for name in held}), sweep),
        claims=(*of_sets, *of_ranks),
        missing=missing,
    )


def draw_correlation(axes: Any, depth: np.ndarray, correlation: dict[str, np.ndarray]) -> None:
    """Draw Spearman's correlation of LP with other metrics into matplotlib ``axes``, by depth.

    Args:
        depth: Place of each unit's FFN in model order, (unit,).
        correlation: Metric to the correlation of each unit, (unit,).
    """
    for number, (name, values) in enumerate(correlation.items()):
        drawing.by_depth(axes, depth, values, number, name)
        if name in paper.SPEARMAN:
            drawing.paper_line(axes, paper.SPEARMAN[name], number)
    axes.axhline(0, color=drawing.GREY, linewidth=0.8)
    axes.set_ylim(-1, 1)
    drawing.depth_axis(axes)
    axes.set_title("Spearman's correlation with LP")


def draw_overlap(axes: Any, sizes: list[float], overlaps: dict[str, list[Middle]], by_chance: list[float]) -> None:
    """Draw the Jaccard index of top sets by LP and by other metrics into matplotlib ``axes``, against the sets' size.

    Args:
        sizes: Share of the channels in a set, ascending.
        overlaps: Metric to the index at each size.
        by_chance: Index of random sets at each size.
    """
    # In narrow FFNs several sizes are the same number of channels.
    places = [place for place, size in enumerate(sizes) if size not in sizes[:place]]
    x = [sizes[place] for place in places]
    for number, (name, found) in enumerate(overlaps.items()):
        axes.plot(x, [found[place].median for place in places], label=name, **drawing.line_style(number))
    axes.plot(x, [by_chance[place] for place in places], color=drawing.GREY, linestyle=":", label="by chance")
    drawing.paper_point(axes, 0.01, paper.ACTIVATION_JACCARD, f"activation_power, {drawing.PAPER}")
    axes.set_xscale("log")
    axes.set_xlabel("size of the sets, share of the channels")
    axes.set_ylabel("Jaccard with the top by LP")
    axes.set_xticks(x, [f"{100 * size:.2g}%" for size in x])
    axes.minorticks_off()
    drawing.share_axis(axes)
