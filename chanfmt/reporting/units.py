"""The FFNs that statistics are made of: every dense FFN, and every expert that tokens reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.format.reader import Atlas, Stack


@dataclass(frozen=True, eq=False)
class Unit:
    """Channels that are ranked together.

    Attributes:
        depth: Place of the FFN in model order.
        expert: -1 where it is dense.
    """

    depth: int
    layer: int
    stack_name: str
    expert: int
    stack: Stack
    row: int

    def holds(self, name: str) -> bool:
        return name in self.stack

    def values(self, name: str) -> np.ndarray:
        """The variable ``name``, (channel,). Raises `AtlasError` where the stack has none."""
        row = self.stack.row(name, self.row)
        return row if self.expert < 0 else row[self.expert]

    def known(self, name: str) -> np.ndarray:
        """The finite values of ``name``, (n,); none where the stack does not hold it."""
        values = self.values(name) if self.holds(name) else np.array([])
        return values[np.isfinite(values)]

    def number(self, name: str) -> float:
        """A variable of one number an FFN, or an expert; NaN where the stack does not hold it."""
        if not self.holds(name):
            return float("nan")
        row = self.stack[name][self.row]
        return float(row if self.expert < 0 else row[self.expert])

    def by_split(self, name: str) -> np.ndarray:
        """A variable with an axis of splits in front, (split,) or (split, channel)."""
        rows = self.stack[name][:, self.row]
        return rows if self.expert < 0 else rows[:, self.expert]


def find_units(atlas: Atlas) -> tuple[list[Unit], int]:
    """Units with a known LP in model order, and how many have none: experts that no token reached."""
    units, without = [], 0
    for block, stack in atlas.rows():
        if "lp" not in stack:
            without += max(1, stack.n_experts)
            continue
        known = np.isfinite(np.atleast_2d(stack.row("lp", block.row))).any(axis=1)
        for number in range(max(1, stack.n_experts)):
            if not known[number]:
                without += 1
                continue
            units.append(
                Unit(block.index, block.layer_index, printable(stack.name), number if stack.n_experts else -1, stack, block.row)
            )
    return units, without


def name_columns(units: Sequence[Unit]) -> dict[str, np.ndarray]:
    """Columns that say which unit a row is of."""
    columns = {
        "ffn": np.array([unit.depth for unit in units]),
        "layer": np.array([unit.layer for unit in units]),
        "stack": np.array([unit.stack_name for unit in units]),
    }
    if any(unit.expert >= 0 for unit in units):
        columns["expert"] = np.array([unit.expert for unit in units])
    return columns
