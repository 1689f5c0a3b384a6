"""Whether the halo repeats the supernodes, beyond channels as important and beyond chance."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.analysis.halo import HaloRedundancy, halo_redundancy
from chanfmt.analysis.resample import middle
from chanfmt.console import significant
from chanfmt.report import drawing, paper
from chanfmt.report.section import Claim, Plot, Section, Table
from chanfmt.report.units import name_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.report.units import Unit

KINDS = {"halo": "halo", "matched": "others, as important", "others": "all others"}


def make(units: Sequence[Unit]) -> Section:
    title = "Redundancy of the halo"
    if not any(unit.holds("redundancy") and unit.holds("label") for unit in units):
        return Section("halo", title, missing=("no redundancy in this atlas: it comes from a build without --no-redundancy, "
                                              "and merging or stripping drops it",))
    rows, kept = [], []
    for unit in units:
        if not (unit.holds("redundancy") and unit.holds("label")):
            continue
        null = unit.values("redundancy_null") if unit.holds("redundancy_null") else None
        row = halo_redundancy(unit.values("lp"), unit.values("label"), unit.values("redundancy"), null)
        if row is not None:
            rows.append(row)
            kept.append(unit)
    if not rows:
        return Section("halo", title, missing=("no FFN has a halo and as many other channels whose redundancy is known",))
    names = [field.name for field in dataclasses.fields(HaloRedundancy)]
    numbers = {name: np.array([getattr(row, name) for row in rows], dtype=np.float64) for name in names}
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = {
            "over_matched": numbers["halo"] / numbers["matched"],
            "over_others": numbers["halo"] / numbers["others"],
            "over_null": numbers["halo"] / numbers["halo_null"],
            "excess_over_matched": (numbers["halo"] - numbers["halo_null"]) / (numbers["matched"] - numbers["matched_null"]),
        }
    found = {name: middle(np.where(np.isfinite(values), values, np.nan)) for name, values in ratios.items()}
    columns = name_columns(kept)
    over = found["over_matched"]
    null_known = bool(np.isfinite(numbers["halo_null"]).any())
    sentences = [
        f"In the median FFN the halo's redundancy to the supernodes is {significant(over.median, 3)} times that of as many "
        f"other channels of the nearest LP (bootstrap over FFNs {significant(over.low, 3)} to {significant(over.high, 3)}), and "
        f"{significant(found['over_others'].median, 3)} times that of all others.",
    ]
    if null_known:
        sentences.append(
            f"It is {significant(found['over_null'].median, 3)} times its own null, the same channels against supernodes "
            "shifted by a sequence, which nothing but chance connects. Below about one, redundancy says nothing.")
    return Section(
        key="halo",
        title=title,
        text=tuple(sentences),
        numbers={key: value for name, item in found.items() for key, value in (
            (f"halo_{name}_median", item.median), (f"halo_{name}_low", item.low), (f"halo_{name}_high", item.high))},
        plots=(Plot(
            "halo",
            "Mean redundancy to the supernodes by depth: of the halo, of other channels matched in LP, of all others; and "
            f"the halo's null. The paper has the halo at about {paper.HALO_RATIO:g} times other channels ({paper.MODEL}); here "
            f"{significant(found['over_others'].median, 3)} times all others, {significant(over.median, 3)} times the matched.",
            ("halo",), lambda figure: _draw(figure, columns["ffn"], numbers),
        ),),
        tables=(Table("halo", columns | numbers | ratios),),
        claims=(
            Claim("The halo is more redundant with the supernodes than other channels", f"about {paper.HALO_RATIO:g} times "
                  f"({paper.MODEL}; an estimator without a null)", f"{significant(found['over_others'].median, 3)} times",
                  bool(found["over_others"].median > 1.25), "over 1.25 times in the median FFN"),
            Claim("That is not because its channels are more important", "not shown with channels matched in LP and a null",
                  f"{significant(over.median, 3)} times the matched, interval from {significant(over.low, 3)}",
                  None if np.isnan(over.low) else bool(over.low > 1), "the interval over FFNs lies above 1"),
        ),
        missing=() if null_known else ("no null of the redundancy in this atlas",),
    )


def _draw(figure: Any, depth: np.ndarray, numbers: dict[str, np.ndarray]) -> None:
    axes = figure.subplots()
    for number, (name, label) in enumerate(KINDS.items()):
        drawing.by_depth(axes, depth, numbers[name], number, label)
    drawing.by_depth(axes, depth, numbers["halo_null"], 3, "halo, null")
    drawing.log_axis(axes, np.concatenate([numbers[name] for name in KINDS]))
    axes.set_xlabel("FFN, in model order")
    axes.set_ylabel("nats")
    axes.set_title("mean redundancy to the supernodes")
    drawing.legend(axes, ncols=2)
