"""The address of one number of a write matrix."""

from __future__ import annotations

from typing import NamedTuple


class Weight(NamedTuple):
    """One number of a write matrix.

    Attributes:
        block: Block index.
        expert: Number of the expert; 0 for a dense FFN.
        row: Residual dimension that it writes to.
        channel: Channel that it belongs to.
        step: Rows from ``row`` to the number that is meant; behind the last row comes the first.
    """

    block: int
    expert: int
    row: int
    channel: int
    step: int = 0
