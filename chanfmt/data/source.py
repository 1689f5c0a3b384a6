"""The sequences that one calibration source gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Source:
    """The sequences that one source gives.

    Attributes:
        name: Name of the source, as the atlas records it.
        revision: SHA-256 of its text or file; of its token ids if it has neither, hexadecimal.
        blocks: Number of blocks that the sequences were drawn from.
        ids: Token ids of the drawn blocks, int32 (sequence, position); empty if the model takes arrays that are not tokens.
        inputs: For a file of inputs, the arrays it holds: `chanfmt.data.arrays.InputFile.layout`.
    """

    name: str
    revision: str
    blocks: int
    ids: np.ndarray
    inputs: str = ""
