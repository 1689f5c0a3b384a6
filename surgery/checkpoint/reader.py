"""Gather parts of tensors of any dtype, as the unsigned integers that hold their bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chanfmt.models.stored import view

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chanfmt.models.checkpoint import TensorEntry

CHUNK_BYTES = 8 << 20


def gather(entry: TensorEntry, axis: int, positions: np.ndarray) -> Iterator[np.ndarray]:
    """The tensor at ``positions`` of ``axis``, as consecutive parts in the order of its bytes.

    Args:
        entry: The tensor.
        axis: Axis to gather along.
        positions: Ascending positions on it, int64.

    Yields:
        Contiguous unsigned integers, each about `CHUNK_BYTES`, of shape (outer, positions, inner)
        where outer and inner are the axes before and behind ``axis``; a part covers some of the
        outer positions, or some of ``positions`` where there is only one.
    """
    outer = int(np.prod(entry.shape[:axis], dtype=np.int64))
    inner = int(np.prod(entry.shape[axis + 1:], dtype=np.int64))
    array = view(entry).reshape(outer, entry.shape[axis], inner)
    if outer == 1:
        for part in _parts(len(positions), inner * array.itemsize):
            yield np.take(array, positions[part], axis=1)
    else:
        for part in _parts(outer, entry.shape[axis] * inner * array.itemsize):
            yield np.take(array[part], positions, axis=1)


def _parts(length: int, item_bytes: int) -> Iterator[slice]:
    step = max(1, CHUNK_BYTES // max(1, item_bytes))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
