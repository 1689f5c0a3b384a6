"""The unit that importance is ranked in: a dense FFN, or one expert of an FFN with experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.format.show import short

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chanfmt.format.arrays import StackArrays
    from chanfmt.format.records import Block


@dataclass(frozen=True, eq=False)
class Unit:
    """Channels that are ranked together.

    Attributes:
        block: The FFN.
        stack: The stack that holds the FFN's arrays.
        expert: Number of the expert; None for a dense FFN.
    """

    block: Block
    stack: StackArrays
    expert: int | None = None

    @property
    def index(self) -> int:
        """Place of the FFN in model order."""
        return self.block.index

    @property
    def layer(self) -> int:
        """Layer index in the model."""
        return self.block.layer_index

    @property
    def row(self) -> int:
        """Row of the FFN in the stack's arrays."""
        return self.block.row

    @property
    def n_channels(self) -> int:
        return self.block.n_channels

    @property
    def labels(self) -> np.ndarray:
        """Label of every channel, uint8 (channel,). Raises `AtlasError` if the stack holds no labels."""
        return self.values("label")

    @property
    def tokens(self) -> int:
        """Calibration tokens that reached the unit. Raises `AtlasError` if the stack does not say."""
        return int(self._own(self.stack.row("tokens", self.row)))

    def holds(self, name: str) -> bool:
        """Whether the stack holds the variable ``name``."""
        return name in self.stack

    def values(self, name: str) -> np.ndarray:
        """The variable ``name``, (channel,), in the type it is stored in. Raises `AtlasError` if the stack does not hold it."""
        return self._own(self.stack.row(name, self.row))

    def known(self, name: str) -> np.ndarray:
        """The finite values of ``name``, (n,); none if the stack does not hold the variable."""
        values = self.values(name) if self.holds(name) else np.array([])
        return values[np.isfinite(values)]

    def number(self, name: str) -> float:
        """The value of a variable that has one number per unit; NaN if the stack does not hold the variable."""
        return float(self._own(self.stack.row(name, self.row))) if self.holds(name) else float("nan")

    def by_split(self, name: str) -> np.ndarray:
        """A variable with an axis before the layer, such as splits: (split,) or (split, channel).

        Raises:
            AtlasError: The stack does not hold the variable.
        """
        rows = self.stack[name][:, self.row]
        return rows if self.expert is None else rows[:, self.expert]

    def _own(self, row: np.ndarray) -> np.ndarray:
        return row if self.expert is None else row[self.expert]

    def __repr__(self) -> str:
        expert = "" if self.expert is None else f", expert {self.expert}"
        return f"<Unit: layer {self.layer}{expert} of {short(self.stack.name)!r}, {self.n_channels:,} channels>"


def units_of(block: Block, stack: StackArrays) -> Iterator[Unit]:
    """The units of one FFN: the FFN itself if it is dense, otherwise each of its experts in order."""
    return (Unit(block, stack, expert) for expert in block.experts)


def unit_rows(values: np.ndarray) -> np.ndarray:
    """A view of ``values``, an array of `Block.shape`, with one row per unit: (unit, channel).

    Raises:
        ValueError: ``values`` has neither one nor two dimensions.

    >>> unit_rows(np.array([1, 2])).shape
    (1, 2)
    """
    if values.ndim not in (1, 2):
        raise ValueError(f"an array of one FFN's channels has one or two dimensions, not {values.ndim}")
    return values if values.ndim == 2 else values[np.newaxis]
