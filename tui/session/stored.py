"""Arrays that stay in the file until a screen shows them, because the arrays of a large model would fill the memory."""

from __future__ import annotations

import math
import os
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from chanfmt.format.reader import Location

KEPT_BYTES = 8 << 20
"""Size of the cache."""


class StoredArrays:
    """Rows of the arrays in one file. The rows read last are kept.

    The file is open without HDF5's lock, so other programs may write to it. If another program replaces the file, this
    object goes on reading the old file. If another program writes the file in place, this object reads the new bytes, and
    NaN if the file has become too short.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        self.signature = status.st_mtime_ns, status.st_size, status.st_ino
        self._kept: OrderedDict[tuple[int, ...], np.ndarray] = OrderedDict()
        self._bytes = 0

    def at(self, location: Location, *index: int) -> np.ndarray:
        """The part of the array at ``location`` that ``index`` selects along the first axes, floating point."""
        key = (location.offset, *index)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        values = self._read(location, index)
        self._kept[key] = values
        self._bytes += values.nbytes
        while self._bytes > KEPT_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return values

    def fresh(self, location: Location, *index: int) -> np.ndarray:
        """As `at`, but without the cache: for one number, or for a whole array. Any thread may call this."""
        return self._read(location, index)

    def _read(self, location: Location, index: tuple[int, ...]) -> np.ndarray:
        shape = location.shape[len(index) :]
        size = math.prod(shape) * location.dtype.itemsize
        place = int(np.ravel_multi_index(index, location.shape[: len(index)])) if index else 0
        data = os.pread(self._descriptor, size, location.offset + place * size)
        if len(data) < size:
            return np.full(shape, np.nan, dtype=np.float32)
        values = np.frombuffer(data, location.dtype).reshape(shape)
        return values if values.dtype.kind == "f" else values.astype(np.float64)
