"""The units that statistics are made of: every dense FFN, and every expert that tokens reached."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.text import one_line
from chanfmt.format.unit import unit_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.format.reader import Atlas
    from chanfmt.format.unit import Unit


def find_units(atlas: Atlas) -> tuple[list[Unit], int]:
    """Find the units whose LP is known, in model order.

    Returns:
        The units, and how many have no known LP: experts that no token reached.
    """
    found: list[Unit] = []
    without = 0
    for block, stack in atlas.rows():
        known = (
            np.isfinite(unit_rows(stack.row("lp", block.row))).any(axis=1)
            if "lp" in stack
            else np.zeros(len(block.experts), dtype=bool)
        )
        found += [unit for unit, there in zip(atlas.units(block), known, strict=True) if there]
        without += int((~known).sum())
    return found, without


def name_columns(units: Sequence[Unit]) -> dict[str, np.ndarray]:
    """Columns that name the unit of every row; -1 is the expert of a dense FFN."""
    columns = {
        "ffn": np.array([unit.index for unit in units]),
        "layer": np.array([unit.layer for unit in units]),
        "stack": np.array([one_line(unit.stack.name) for unit in units]),
    }
    if has_experts(units):
        columns["expert"] = np.array([-1 if unit.expert is None else unit.expert for unit in units])
    return columns


def has_experts(units: Sequence[Unit]) -> bool:
    """Whether some of ``units`` are experts."""
    return any(unit.expert is not None for unit in units)
