"""Whether the halo repeats the supernodes, more than equally important channels do and more than by chance."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.analysis.halo import HaloRedundancy, halo_redundancy
from chanfmt.analysis.resample import middle
from chanfmt.format.columns import REDUNDANCY_CHANCE
from chanfmt.reporting import drawing, paper
from chanfmt.reporting.section import Claim, Plot, Section, Table, above
from chanfmt.reporting.units import has_experts, name_columns
from chanfmt.reporting.words import bracketed, percent, times, with_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.format.unit import Unit

KINDS = {"halo": "halo", "matched": "others, as important", "others": "all others"}


def make(units: Sequence[Unit], tokens: int) -> Section:
    """Make the section about the halo; ``tokens`` is the number of calibration tokens."""
    title = "Redundancy of the halo"
    if not any(unit.holds("redundancy") and unit.holds("label") for unit in units):
        return Section(
            "halo",
            title,
            missing=("no redundancy in this atlas: a build measures it, merging drops it, and a file need not hold it",),
        )
    rows, kept = [], []
    for unit in units:
        if not (unit.holds("redundancy") and unit.holds("label")):
            continue
        null, by_chance = (unit.values(name) if unit.holds(name) else None for name in ("redundancy_null", REDUNDANCY_CHANCE))
        row = halo_redundancy(unit.values("lp"), unit.values("label"), unit.values("redundancy"), null, by_chance)
        if row is not None:
            rows.append(row)
            kept.append(unit)
    if not rows:
        return Section("halo", title, missing=("no FFN has a halo and as many other channels whose redundancy is known",))
    names = [field.name for field in dataclasses.fields(HaloRedundancy)]
    numbers = {name: np.array([getattr(row, name) for row in rows], dtype=np.float64) for name in names}
    numbers |= {name: np.array([float(unit.number(name)) for unit in kept]) for name in ("core_covered", "redundancy_tokens")}
    # The excess is over chance alone, if the atlas knows it.
    kind = "chance" if np.isfinite(numbers["halo_chance"]).any() else "null"
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = {
            "over_matched": numbers["halo"] / numbers["matched"],
            "over_others": numbers["halo"] / numbers["others"],
            "over_null": numbers["halo"] / numbers["halo_null"],
            "over_chance": numbers["halo"] / numbers["halo_chance"],
            "null_over_chance": numbers["halo_null"] / numbers["halo_chance"],
            "excess_over_matched": (numbers["halo"] - numbers[f"halo_{kind}"])
            / (numbers["matched"] - numbers[f"matched_{kind}"]),
        }
    columns = name_columns(kept)
    found = {name: middle(np.where(np.isfinite(values), values, np.nan), columns["ffn"]) for name, values in ratios.items()}
    over, others, beside = found["over_matched"], found["over_others"], found["over_null"]
    covered, used = middle(numbers["core_covered"]), middle(numbers["redundancy_tokens"])
    sentences = [
        f"In the median FFN, the halo's redundancy to the supernodes is {times(over.median)} times the redundancy of as many "
        f"other channels of similar LP{bracketed(over, times)}, and {times(others.median)} times the redundancy of all other "
        f"channels{bracketed(others, times)}.",
    ]
    chance, placed = found["over_chance"], found["null_over_chance"]
    if chance.count:
        sentences.append(
            f"It is {times(chance.median)} times what chance gives{bracketed(chance, times)}: the redundancy of the same channels "
            f"with the supernodes {'at least a quarter of a batch away' if has_experts(kept) else 'in another sequence'}, at other "
            "positions. If the ratio is near one, redundancy says nothing."
        )
    if beside.count:
        away = "half a batch" if has_experts(kept) else "a sequence"
        compared = (
            f"This null is {times(placed.median)} times what chance gives{bracketed(placed, times)}; what lies above 1 is the effect "
            "of the position."
            if placed.count
            else "If the ratio is near one, redundancy says nothing."
        )
        sentences.append(
            f"It is {times(beside.median)} times its null{bracketed(beside, times)}. The null compares the same channels with the "
            f"supernodes on other tokens, {away} away, so both numbers include chance and the effect of the position in the "
            f"sequence. {compared}"
        )
    if used.count:
        sentences.append(
            f"Redundancy was measured on {used.median:,.0f} of {tokens:,} tokens (median), with the supernodes that were among the "
            f"candidates chosen early in the pass: a median of {percent(covered.median)} of an FFN's supernodes, and at least "
            f"{percent(covered.smallest)}."
        )
    claims = (
        Claim(
            "The halo is more redundant with the supernodes than other channels",
            f"about {paper.HALO_RATIO:g} times ({paper.MODEL}; its estimator adds 1e-8 to variances of 1e-16)",
            f"{with_interval(others, times)} times",
            above(others, 1.0),
            "its interval lies above 1",
        ),
        Claim(
            "The halo is more redundant than other channels of like importance",
            "more than matched channels, without a number that we know",
            f"{with_interval(over, times)} times the matched channels",
            above(over, 1.0),
            "its interval lies above 1",
        ),
    )
    return Section(
        key="halo",
        title=title,
        text=tuple(sentences),
        numbers={
            key: value
            for name, item in found.items()
            if item.count
            for key, value in (
                (f"halo_{name}_median", item.median),
                (f"halo_{name}_low", item.low),
                (f"halo_{name}_high", item.high),
            )
        }
        | (
            {
                "redundancy_tokens_median": used.median,
                "core_covered_median": covered.median,
                "core_covered_smallest": covered.smallest,
            }
            if used.count
            else {}
        ),
        plots=(
            Plot(
                "halo",
                "Mean redundancy to the supernodes, by depth: the halo, other channels matched in LP, all other channels, and what "
                f"{'chance gives the halo' if chance.count else 'the null gives the halo'}.",
                ("halo",),
                (lambda axes: draw_redundancy(axes, columns["ffn"], numbers),),
                claims=claims,
                legend_below=True,
            ),
        ),
        tables=(Table("halo", columns | numbers | ratios),),
        claims=claims,
        missing=() if beside.count or chance.count else ("no null of the redundancy in this atlas",),
    )


def draw_redundancy(axes: Any, depth: np.ndarray, numbers: dict[str, np.ndarray]) -> None:
    """Draw the mean redundancy of kinds of channels to the supernodes into matplotlib ``axes``, by depth.

    Args:
        depth: Place of each unit's FFN in model order, (unit,).
        numbers: Mean redundancy of each unit in nats, (unit,), by the names of `KINDS`, ``halo_null`` and
            ``halo_chance``. A curve without any number is left out.
    """
    for number, (name, label) in enumerate(KINDS.items()):
        drawing.by_depth(axes, depth, numbers[name], number, label)
    nulls = {"halo_chance": "halo, by chance", "halo_null": "halo, null with equal positions"}
    for number, (name, label) in enumerate(nulls.items(), len(KINDS)):
        if np.isfinite(numbers[name]).any():
            drawing.by_depth(axes, depth, numbers[name], number, label)
    drawing.log_axis(axes, np.concatenate([numbers[name] for name in KINDS]))
    drawing.depth_axis(axes)
    axes.set_ylabel("nats")
    axes.set_title("mean redundancy to the supernodes")
