"""Batches of calibration sequences: each of one source, and either for the fit or held out from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HELD_OUT = 8
"""Every eighth sequence of a source is held out, or the last one if the source has fewer. A single sequence is fitted."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences that pass through the model together.

    Attributes:
        ids: Token ids, int64 (sequence, position).
        source: Number of their source.
        held_out: Whether they are held out from the fit.
    """

    ids: torch.Tensor
    source: int
    held_out: bool

    @property
    def group(self) -> tuple[int, bool]:
        """Source and fold."""
        return self.source, self.held_out


def split_batches(tokens: np.ndarray, source_of: np.ndarray | None, size: int) -> list[Batch]:
    """Divide sequences into batches, those of the fit first.

    Args:
        tokens: Token ids, int32 (sequence, position).
        source_of: Number of the source of each sequence, int (sequence,); None if all are of one source.
        size: Largest number of sequences in a batch.
    """
    fitted: list[Batch] = []
    held: list[Batch] = []
    if source_of is None:
        source_of = np.zeros(len(tokens), dtype=np.int32)
    for source in np.unique(source_of).tolist():
        rows = np.flatnonzero(source_of == source)
        out = rows[HELD_OUT - 1 :: HELD_OUT] if len(rows) >= HELD_OUT else rows[1:][-1:]
        fitted += _batches(tokens, np.setdiff1d(rows, out), source, False, size)
        held += _batches(tokens, out, source, True, size)
    return [*fitted, *held]


def fold_places(batches: Sequence[Batch]) -> tuple[list[int], list[int]]:
    """Numbers of the fitted batches, and of those that are held out."""
    fitted, held = ([place for place, batch in enumerate(batches) if batch.held_out is out] for out in (False, True))
    return fitted, held


def _batches(tokens: np.ndarray, rows: np.ndarray, source: int, held_out: bool, size: int) -> Iterator[Batch]:
    for start in range(0, len(rows), size):
        yield Batch(torch.from_numpy(tokens[rows[start : start + size]].astype("int64")), source, held_out)
