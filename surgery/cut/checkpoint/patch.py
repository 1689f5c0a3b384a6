"""Replace numbers in a tensor of a checkpoint that was just written."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import torch

from chanfmt.base.errors import ModelError
from chanfmt.base.files import read_at, write_at
from chanfmt.models.safetensors import CONTAINERS, DTYPE_BITS
from chanfmt.models.stored.tensors import DTYPES

if TYPE_CHECKING:
    from chanfmt.models.safetensors import TensorEntry
    from surgery.cut.checkpoint.cuts import Cut


def as_stored(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """``values`` on the CPU, rounded to the safetensors dtype ``dtype``.

    Raises:
        ModelError: ``dtype`` is not a float of at least 16 bits, or a value is too large for it.
    """
    kind = DTYPES.get(dtype)
    if kind is None or not kind.is_floating_point:
        raise ModelError(f"weights stored as {dtype} cannot be refitted", hint="save the model in bfloat16 first")
    rounded = values.cpu().to(kind)
    if not bool(rounded.isfinite().all()):
        raise ModelError(f"a refitted weight does not fit into {dtype}")
    return rounded


def write_kept(entry: TensorEntry, cut: Cut, positions: np.ndarray, values: torch.Tensor, index: int | None = None) -> None:
    """Replace the kept channels of a matrix or a vector in its file.

    Args:
        entry: The tensor after the cut, with one or two axes, and one more in front if ``index`` is a number.
        cut: The cut that made the tensor.
        positions: Positions of the kept channels on the cut axis before the cut, int (kept,).
        values: New values from `as_stored`, (other axis, kept), or (kept,).
        index: Number of the expert on the tensor's first axis; None if the tensor has no such axis.
    """
    bits = _bits(values, entry)
    places = cut.places(positions, index if index is not None and cut.by_expert else 0)
    shape = entry.shape if index is None else entry.shape[1:]
    descriptor = os.open(entry.file, os.O_RDWR)
    try:
        data = np.empty(shape, dtype=bits.dtype)
        start = entry.start + (index or 0) * data.nbytes
        read_at(descriptor, data.reshape(-1).view(np.uint8).data, start)
        if cut.axis == (0 if index is None else 1):
            data[places] = bits.T
        else:
            data[:, places] = bits
        write_at(descriptor, data.reshape(-1).view(np.uint8).data, start)
    finally:
        os.close(descriptor)


def write_vector(entry: TensorEntry, index: int | None, values: torch.Tensor) -> None:
    """Replace a vector, or row ``index`` of a matrix, in its file by ``values`` from `as_stored`."""
    bits = _bits(values, entry)
    descriptor = os.open(entry.file, os.O_RDWR)
    try:
        write_at(descriptor, bits.view(np.uint8).data, entry.start + (index or 0) * bits.nbytes)
    finally:
        os.close(descriptor)


def _bits(values: torch.Tensor, entry: TensorEntry) -> np.ndarray:
    return values.contiguous().view(torch.uint8).numpy().view(CONTAINERS[DTYPE_BITS[entry.dtype]])
