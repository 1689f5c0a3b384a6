"""Rows of matrices in a GGUF file, and in a float32 checkpoint, read a few at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from chanfmt.models.gguf_header import Header, StoredTensor
    from chanfmt.models.safetensors import TensorEntry


def stored_rows(
    path: Path, header: Header, tensor: StoredTensor, matrix: int, start: int, stop: int, row_bytes: int
) -> np.ndarray:
    """Rows of a matrix of ``tensor`` in the GGUF file ``path``, as they are stored: uint8 (row, byte).

    Args:
        matrix: Number of the matrix, such as that of an expert.
        start, stop: Range of the rows.

    Raises:
        ModelError: The file is shorter than its header says.
    """
    rows = tensor.shape[-2] if len(tensor.shape) > 1 else 1
    first = header.data + tensor.offset + (matrix * rows + start) * row_bytes
    return _read(path, first, (stop - start) * row_bytes).reshape(stop - start, row_bytes)


def float_rows(entry: TensorEntry, start: int, stop: int, *, transposed: bool = False) -> np.ndarray:
    """Rows of a float32 matrix of a checkpoint: float32 (row, column). A vector is one row.

    Args:
        transposed: Whether the rows are those of the transposed matrix, which is then read whole.

    Raises:
        ModelError: The file is shorter than its header says.
    """
    if transposed:
        whole = _read(entry.file, entry.start, entry.nbytes).view("<f4").reshape(entry.shape)
        return np.ascontiguousarray(whole.T[start:stop])
    columns = entry.shape[-1]
    found: np.ndarray = _read(entry.file, entry.start + 4 * columns * start, 4 * columns * (stop - start)).view("<f4")
    return found.reshape(stop - start, columns)


def _read(path: Path, start: int, count: int) -> np.ndarray:
    found = np.fromfile(path, dtype=np.uint8, count=count, offset=start)
    if len(found) < count:
        raise ModelError(f"{path} is shorter than its header says")
    return found
