"""The driving tokens of a merged atlas (columns-1.md, "Driving tokens"). Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.format.columns import DRIVING_POSITION, DRIVING_SEQUENCE, DRIVING_VALUE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.format.reader import Atlas, Stack


@dataclass(frozen=True)
class Driving:
    """The driving tokens of a stack; all arrays are (layer[, expert], channel, driver).

    Attributes:
        value: Values u, the largest |u| first, float32; NaN where there are not so many.
        sequence, position: Where they are, int32; -1 if that is not known.
    """

    value: np.ndarray
    sequence: np.ndarray
    position: np.ndarray

    @classmethod
    def of(cls, stack: Stack) -> Driving | None:
        """Those of ``stack``; None if it has none."""
        names = DRIVING_VALUE, DRIVING_SEQUENCE, DRIVING_POSITION
        return cls(*(stack[name] for name in names)) if DRIVING_VALUE in stack else None

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by their names in an atlas."""
        return {DRIVING_VALUE: self.value, DRIVING_SEQUENCE: self.sequence, DRIVING_POSITION: self.position}

    def renumbered(self, numbers: np.ndarray) -> Driving:
        """The same with sequence i as ``numbers[i]``. A sequence that does not exist is unknown."""
        known = (self.sequence >= 0) & (self.sequence < len(numbers))
        sequence = np.where(known, numbers[np.where(known, self.sequence, 0)], -1)
        return Driving(self.value, sequence.astype(np.int32), np.where(known, self.position, -1).astype(np.int32))

    def joined(self, other: Driving) -> Driving:
        """The largest of both, as many of each channel as the one with fewer has."""
        value, sequence, position = (
            np.concatenate(pair, axis=-1)
            for pair in ((self.value, other.value), (self.sequence, other.sequence), (self.position, other.position))
        )
        # Of equal values the first sequence counts, and in it the first position. Unknown places come last, and then no value.
        last = np.iinfo(np.int32).max
        places = (np.where(values < 0, last, values) for values in (position, sequence))
        order = np.lexsort((*places, -np.nan_to_num(np.abs(value), nan=-1.0)))
        order = order[..., : min(self.value.shape[-1], other.value.shape[-1])]
        return Driving(*(np.take_along_axis(values, order, -1) for values in (value, sequence, position)))


def sequence_numbers(atlases: Sequence[Atlas]) -> list[np.ndarray]:
    """For each of ``atlases``, the number of each of its sequences in the merged atlas, int64 (sequence,)."""
    digests = sorted(digest for atlas in atlases for digest in atlas.calibration.sequence_sha256)
    number = {digest: place for place, digest in enumerate(digests)}
    return [np.array([number[digest] for digest in atlas.calibration.sequence_sha256], dtype=np.int64) for atlas in atlases]
