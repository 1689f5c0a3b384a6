"""Put new numbers into a tensor of a checkpoint that was just written."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import torch

from chanfmt.errors import ModelError

if TYPE_CHECKING:
    from chanfmt.models.checkpoint import TensorEntry
    from surgery.checkpoint.cuts import Cut

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def write_kept(entry: TensorEntry, cut: Cut, positions: np.ndarray, values: torch.Tensor) -> torch.Tensor:
    """Replace the kept channels of a matrix in its file.

    Args:
        entry: The matrix after the cut, two axes.
        cut: How it came to be.
        positions: Where its kept channels were on the axis that was cut, before.
        values: New values, (other axis, kept).

    Returns:
        ``values`` as the file holds them, rounded to its dtype.

    Raises:
        ModelError: Its dtype is not one of floats of 16 bits or more, or a value is too large for it.
    """
    if entry.dtype not in _DTYPES:
        raise ModelError(f"a matrix stored as {entry.dtype} cannot be refitted", hint="save the model in bfloat16 first")
    rounded = values.cpu().to(_DTYPES[entry.dtype])
    if not bool(rounded.isfinite().all()):
        raise ModelError(f"a refitted weight does not fit into {entry.dtype}")
    size = entry.nbytes // max(1, entry.elements)
    bits = rounded.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).numpy()
    places = np.searchsorted(np.where(cut.positions[0] < 0, np.iinfo(np.int64).max, cut.positions[0]), positions)
    descriptor = os.open(entry.file, os.O_RDWR)
    try:
        data = np.frombuffer(os.pread(descriptor, entry.nbytes, entry.start), dtype=bits.dtype).reshape(entry.shape).copy()
        if cut.axis == 0:
            data[places] = bits.T
        else:
            data[:, places] = bits
        view, position = data.reshape(-1).view(np.uint8).data, 0
        while position < len(view):
            position += os.pwrite(descriptor, view[position:], entry.start + position)
    finally:
        os.close(descriptor)
    return rounded
