"""Read parts of tensors of any dtype, as the unsigned integers that hold their bits."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.errors import ModelError
from chanfmt.base.files import read_at
from chanfmt.models.safetensors import CONTAINERS, DTYPE_BITS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from chanfmt.models.safetensors import TensorEntry
    from surgery.cut.checkpoint.cuts import Cut

CHUNK_BYTES = 8 << 20
"""Bytes that one part reads, if the tensor's layout allows it."""


@dataclass(frozen=True, eq=False)
class Part:
    """A run of a tensor's new bytes, and the run of old bytes that it comes from.

    Attributes:
        source: Byte range in the source file.
        offset: Offset of the new bytes from the first byte of the new tensor.
        shape: Shape of the old run, (outer, length, inner) elements; None if the bytes are copied unchanged.
        positions: Positions on the middle axis to take, int64, -1 for zeros; None if all positions stay.
        dtype: Unsigned integer of the tensor's element size.
    """

    source: tuple[int, int]
    offset: int
    shape: tuple[int, int, int] | None = None
    positions: np.ndarray | None = None
    dtype: str = "u1"

    def read(self, descriptor: int) -> memoryview:
        """Read the new bytes. Raises `ModelError` if the file is shorter than its header says."""
        start, stop = self.source
        buffer = np.empty(stop - start, dtype=np.uint8)
        if read_at(descriptor, buffer.data, start) < stop - start:
            raise ModelError("a shard of the checkpoint became shorter while it was read")
        if self.shape is None or self.positions is None:
            return buffer.data
        array = buffer.view(self.dtype).reshape(self.shape)
        zeros = self.positions < 0
        if not zeros.any():
            return np.take(array, self.positions, axis=1).reshape(-1).view(np.uint8).data
        taken = np.zeros((self.shape[0], len(self.positions), self.shape[2]), dtype=self.dtype)
        taken[:, ~zeros] = array[:, self.positions[~zeros]]
        return taken.reshape(-1).view(np.uint8).data


def read_ahead(files: Iterable[Path], limit: int) -> None:
    """Read the first ``limit`` bytes of ``files`` into the page cache, in the background.

    Otherwise the disk would be idle while Python imports the modules of the checks.
    """

    def advise() -> None:
        left = limit
        for file in files:
            # This is only a hint. A file that cannot be opened is an error for the function that reads it.
            with contextlib.suppress(OSError), file.open("rb", buffering=0) as stream:
                size = min(left, os.fstat(stream.fileno()).st_size)
                left -= size
                for start in range(0, size, CHUNK_BYTES):
                    os.posix_fadvise(stream.fileno(), start, min(CHUNK_BYTES, size - start), os.POSIX_FADV_WILLNEED)

    if hasattr(os, "posix_fadvise"):
        threading.Thread(target=advise, daemon=True).start()


def copy_parts(entry: TensorEntry) -> Iterator[Part]:
    """The parts of a tensor that is copied unchanged."""
    for start in range(entry.start, entry.stop, CHUNK_BYTES):
        yield Part((start, min(start + CHUNK_BYTES, entry.stop)), start - entry.start)


def cut_parts(entry: TensorEntry, cut: Cut) -> Iterator[Part]:
    """The parts of a tensor after ``cut``."""
    size = DTYPE_BITS[entry.dtype] // 8
    dtype = CONTAINERS[DTYPE_BITS[entry.dtype]]
    first = 1 if cut.by_expert else 0
    outer = int(np.prod(entry.shape[first : cut.axis], dtype=np.int64))
    length = entry.shape[cut.axis]
    item = size * int(np.prod(entry.shape[cut.axis + 1 :], dtype=np.int64))
    inner, new = item // size, cut.positions.shape[1]
    for expert, positions in enumerate(cut.positions):
        source = entry.start + expert * outer * length * item
        target = expert * outer * new * item
        if outer == 1:
            for part in _runs(positions, length, item):
                wanted = positions[part]
                there = wanted[wanted >= 0]
                low, high = (int(there[0]), int(there[-1]) + 1) if len(there) else (0, 0)
                yield Part(
                    (source + low * item, source + high * item),
                    target + part.start * item,
                    (1, high - low, inner),
                    np.where(wanted < 0, -1, wanted - low),
                    dtype,
                )
        else:
            for part in _slices(outer, length * item):
                rows = part.stop - part.start
                yield Part(
                    (source + part.start * length * item, source + part.stop * length * item),
                    target + part.start * new * item,
                    (rows, length, inner),
                    positions,
                    dtype,
                )


def _runs(positions: np.ndarray, length: int, item_bytes: int) -> Iterator[slice]:
    """Slices of ``positions``, each of which reads about `CHUNK_BYTES`."""
    density = max(1.0, length / max(1, len(positions)))
    return _slices(len(positions), max(1, round(item_bytes * density)))


def _slices(length: int, item_bytes: int) -> Iterator[slice]:
    step = max(1, CHUNK_BYTES // max(1, item_bytes))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
