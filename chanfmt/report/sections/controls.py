"""Whether something cheaper than LP finds the same channels: activations, norms of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.analysis.association import top_overlap
from chanfmt.analysis.resample import middle
from chanfmt.compare import rank_correlation
from chanfmt.console import significant
from chanfmt.report import drawing, paper
from chanfmt.report.section import Claim, Plot, Section, Table
from chanfmt.report.units import name_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.report.units import Unit

CONTROLS = ("activation_power", "taylor", "write_norm", "up_norm", "gate_norm")
RHOS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
"""Sizes of the top sets that are compared, as shares of the channels."""


def make(units: Sequence[Unit]) -> Section:
    correlation = {name: np.full(len(units), np.nan) for name in CONTROLS}
    jaccard = {name: np.full((len(RHOS), len(units)), np.nan) for name in CONTROLS}
    chance = np.full((len(RHOS), len(units)), np.nan)
    for place, unit in enumerate(units):
        lp = unit.values("lp")
        for name in CONTROLS:
            if not unit.holds(name):
                continue
            values = unit.values(name)
            correlation[name][place] = rank_correlation(lp, values)
            for row, rho in enumerate(RHOS):
                overlap = top_overlap(lp, values, rho)
                jaccard[name][row, place], chance[row, place] = overlap.jaccard, overlap.chance
    held = [name for name in CONTROLS if any(unit.holds(name) for unit in units)]
    spearman = {name: middle(correlation[name]).median for name in held}
    overlaps = {name: [middle(row).median for row in jaccard[name]] for name in held}
    by_chance = [middle(row).median for row in chance]
    one = RHOS.index(0.01)
    columns = name_columns(units)
    sweep = Table("overlap", {
        "metric": np.repeat(held, len(RHOS)), "rho": np.tile(RHOS, len(held)),
        "jaccard_median": np.array([value for name in held for value in overlaps[name]]),
        "chance": np.tile(by_chance, len(held)),
    })
    power = overlaps.get("activation_power", [float("nan")] * len(RHOS))[one]
    return Section(
        key="controls",
        title="LP against activations and weights",
        text=(
            "Spearman's correlation with LP over an FFN's channels, median over FFNs: "
            + ", ".join(f"{name} {significant(value, 3)}" for name, value in spearman.items())
            + f". Of the top 1% by LP and by activation power a median of {power:.1%} is shared (Jaccard; "
            f"{by_chance[one]:.1%} by chance).",
        ),
        numbers={**{f"spearman_{name}_median": value for name, value in spearman.items()},
                 **{f"jaccard_{name}_at_1_percent": overlaps[name][one] for name in held}, "jaccard_chance": by_chance[one]},
        plots=(
            Plot("spearman",
                 "Spearman's correlation of LP with other quantities over an FFN's channels, by depth. Medians here: "
                 + ", ".join(f"{name} {significant(value, 3)}" for name, value in spearman.items())
                 + f"; in the paper's {paper.MODEL}: "
                 + ", ".join(f"{name} {value:g}" for name, value in paper.SPEARMAN.items()) + ".",
                 ("spearman",), lambda figure: _draw_correlation(figure, columns["ffn"], correlation, held)),
            Plot("overlap",
                 "Jaccard index of the top sets by LP and by each other quantity, median over FFNs, against their size. Grey: "
                 f"sets drawn at random. At 1% for activation power here {power:.1%}, in the paper's {paper.MODEL} "
                 f"{paper.ACTIVATION_JACCARD:.1%}.",
                 ("overlap",), lambda figure: _draw_sweep(figure, overlaps, by_chance), (5.0, 3.4)),
        ),
        tables=(Table("spearman", columns | correlation), sweep),
        claims=(
            Claim("The top 1% by LP are not the top 1% by activation power",
                  f"Jaccard {paper.ACTIVATION_JACCARD:.1%} ({paper.MODEL})", f"Jaccard {power:.1%}",
                  None if np.isnan(power) else bool(power < 0.5), "over half of either set is not in the other"),
            Claim("LP is not read off the norms of weights",
                  ", ".join(f"{name} {paper.SPEARMAN[name]:g}" for name in ("write_norm", "up_norm", "gate_norm")),
                  ", ".join(f"{name} {significant(spearman[name], 3)}" for name in ("write_norm", "up_norm", "gate_norm")
                            if name in spearman),
                  _weak([spearman[name] for name in ("write_norm", "up_norm", "gate_norm") if name in spearman]),
                  "every median correlation is within 0.3 of zero"),
        ),
        missing=tuple(f"no {name} in this atlas" for name in CONTROLS if name not in held),
    )


def _weak(values: list[float]) -> bool | None:
    known = [value for value in values if np.isfinite(value)]
    return all(abs(value) < 0.3 for value in known) if known else None


def _draw_correlation(figure: Any, depth: np.ndarray, correlation: dict[str, np.ndarray], held: list[str]) -> None:
    axes = figure.subplots()
    for number, name in enumerate(held):
        drawing.by_depth(axes, depth, correlation[name], number, name)
    axes.axhline(0, color=drawing.GREY, linewidth=0.8)
    axes.set_ylim(-1, 1)
    axes.set_xlabel("FFN, in model order")
    axes.set_title("Spearman's correlation with LP")
    drawing.legend(axes, ncols=3)


def _draw_sweep(figure: Any, overlaps: dict[str, list[float]], by_chance: list[float]) -> None:
    axes = figure.subplots()
    for number, (name, values) in enumerate(overlaps.items()):
        axes.plot(RHOS, values, label=name, **drawing.line_style(number))
    axes.plot(RHOS, by_chance, color=drawing.GREY, linestyle=":", label="by chance")
    axes.set_xscale("log")
    axes.set_xlabel("size of the sets, share of the channels")
    axes.set_ylabel("Jaccard with the top by LP")
    axes.set_xticks(RHOS, [f"{100 * rho:g}%" for rho in RHOS])
    axes.minorticks_off()
    drawing.share_axis(axes)
    drawing.legend(axes)
