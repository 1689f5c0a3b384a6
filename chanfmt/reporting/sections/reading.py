"""Whether the important channels of a layer read the dimensions that the supernodes of the previous layer write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.analysis.read import read_halo
from chanfmt.analysis.resample import middle
from chanfmt.reporting import drawing, paper
from chanfmt.reporting.section import Plot, Section, Table
from chanfmt.reporting.units import name_columns
from chanfmt.reporting.words import bracketed, percent, times

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.format.unit import Unit

HEADINGS = {"supernodes": "supernodes", "halo": "write halo", "others": "others"}


def make(units: Sequence[Unit], even: float | None) -> Section:
    """Make the section about read connectivity.

    Args:
        even: Read connectivity of a row that reads from all residual dimensions alike; None if it is not known.
    """
    title = "Reading from the write support"
    rows, kept = [], []
    for unit in units:
        if not (unit.holds("read_connectivity") and unit.holds("label")):
            continue
        row = read_halo(unit.values("lp"), unit.values("label"), unit.values("read_connectivity"), paper.READ_HALO)
        if row is not None:
            rows.append(vars(row))
            kept.append(unit)
    if not rows:
        return Section(
            "reading",
            title,
            missing=("no read connectivity in this atlas: it needs supernodes in a previous layer, and the weights",),
        )
    columns = name_columns(kept)
    numbers = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    found = {name: middle(values, columns["ffn"]) for name, values in numbers.items()}
    core, mass = found["supernodes_in_read_halo"], found["lp_in_read_halo"]
    spread = "" if even is None else f" A row that reads from all dimensions alike would have {percent(even)}."
    return Section(
        key="reading",
        title=title,
        text=(
            "Read connectivity is the share of a channel's read rows, by L1 norm, on the dimensions that the supernodes of the "
            f"previous layer write. Its median is {percent(found['supernodes'].median)} for supernodes, "
            f"{percent(found['halo'].median)} for the halo and {percent(found['others'].median)} for other channels.{spread} "
            f"The read halo is the {paper.READ_HALO:.0%} of a layer's channels with the largest read connectivity. It holds a "
            f"median of {percent(core.median)} of the supernodes{bracketed(core, percent)}; chance would give "
            f"{percent(found['chance'].median)}. It holds {percent(mass.median)} of the LP mass{bracketed(mass, percent)}. "
            f"Read connectivity and LP have a Spearman correlation of {times(found['spearman'].median)}.",
        ),
        numbers={f"{name}_median": item.median for name, item in found.items() if item.count}
        | ({} if even is None else {"even_spread": even}),
        plots=(
            Plot(
                "reading",
                "Left: mean share of the read rows' L1 norm on the write support of the previous layer, for three kinds of "
                f"channels{'' if even is None else '; grey: a row that reads from all dimensions alike'}. "
                "Right: share of the supernodes, and of the LP mass, in the read halo; grey: by chance.",
                ("reading",),
                (
                    lambda axes: draw_reading(axes, columns["ffn"], numbers, even),
                    lambda axes: draw_read_halo(axes, columns["ffn"], numbers),
                ),
            ),
        ),
        tables=(Table("reading", columns | numbers),),
    )


def draw_reading(axes: Any, depth: np.ndarray, numbers: dict[str, np.ndarray], even: float | None) -> None:
    """Draw the mean read connectivity of kinds of channels into matplotlib ``axes``, by depth.

    Args:
        depth: Place of each unit's FFN in model order, (unit,).
        numbers: Mean of each unit, (unit,), by the names of `HEADINGS`.
        even: Read connectivity of a row that reads from all residual dimensions alike; None if it is not known.
    """
    colours = (drawing.SUPERNODE, drawing.HALO, drawing.GREY)
    for number, ((name, label), colour) in enumerate(zip(HEADINGS.items(), colours, strict=True)):
        drawing.by_depth(axes, depth, numbers[name], number, label, colour)
    if even is not None:
        axes.axhline(even, color=drawing.GREY, linestyle=":", label="spread evenly")
    axes.set_title("read connectivity")
    _finish(axes)


def draw_read_halo(axes: Any, depth: np.ndarray, numbers: dict[str, np.ndarray]) -> None:
    """Draw what the read halo holds of the supernodes and of LP into matplotlib ``axes``, by depth.

    Args:
        depth: Place of each unit's FFN in model order, (unit,).
        numbers: Share of each unit, (unit,), under ``supernodes_in_read_halo``, ``lp_in_read_halo`` and ``chance``.
    """
    drawing.by_depth(axes, depth, numbers["supernodes_in_read_halo"], 0, "supernodes", drawing.SUPERNODE)
    drawing.by_depth(axes, depth, numbers["lp_in_read_halo"], 2, "LP mass")
    axes.axhline(float(np.median(numbers["chance"])), color=drawing.GREY, linestyle=":", label="by chance")
    axes.set_title("in the read halo")
    _finish(axes)


def _finish(axes: Any) -> None:
    drawing.share_axis(axes)
    drawing.depth_axis(axes)
    drawing.legend(axes)
