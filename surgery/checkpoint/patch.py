"""Put new numbers into a tensor of a checkpoint that was just written."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import torch

from chanfmt.errors import ModelError
from chanfmt.files import read_at, write_at
from chanfmt.models.checkpoint import CONTAINERS, DTYPE_BITS
from chanfmt.models.parameters import DTYPES

if TYPE_CHECKING:
    from chanfmt.models.checkpoint import TensorEntry
    from surgery.checkpoint.cuts import Cut


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
    dtype = DTYPES.get(entry.dtype)
    if dtype is None or not dtype.is_floating_point:
        raise ModelError(f"a matrix stored as {entry.dtype} cannot be refitted", hint="save the model in bfloat16 first")
    rounded = values.cpu().to(dtype)
    if not bool(rounded.isfinite().all()):
        raise ModelError(f"a refitted weight does not fit into {entry.dtype}")
    bits = rounded.contiguous().view(torch.uint8).numpy().view(CONTAINERS[DTYPE_BITS[entry.dtype]])
    places = np.searchsorted(np.where(cut.positions[0] < 0, np.iinfo(np.int64).max, cut.positions[0]), positions)
    descriptor = os.open(entry.file, os.O_RDWR)
    try:
        data = np.empty(entry.shape, dtype=bits.dtype)
        read_at(descriptor, data.reshape(-1).view(np.uint8).data, entry.start)
        if cut.axis == 0:
            data[places] = bits.T
        else:
            data[:, places] = bits
        write_at(descriptor, data.reshape(-1).view(np.uint8).data, entry.start)
    finally:
        os.close(descriptor)
    return rounded
