"""Stored tensors as torch tensors, read by the byte ranges of the index: no header is parsed again."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from chanfmt.base.errors import ModelError
from chanfmt.base.files import read_at

if TYPE_CHECKING:
    from chanfmt.models.safetensors import TensorEntry

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Safetensors dtypes of weights that can be measured, and torch's names for them."""
_FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """All values of a stored tensor. Raises `ModelError` if its dtype cannot be measured or its file cannot be read."""
    if entry.dtype not in DTYPES:
        raise ModelError(f"{entry.file} stores a weight as {entry.dtype}, which cannot be measured")
    return _read(entry, entry.start, entry.nbytes).view(DTYPES[entry.dtype]).reshape(entry.shape)


def read_row(entry: TensorEntry, row: int) -> torch.Tensor | None:
    """Row ``row`` of a stored tensor, (1, ...): one element of its first axis. None if torch has no such dtype.

    Raises:
        ModelError: The file cannot be read.
    """
    dtype = (DTYPES | _FLOAT8).get(entry.dtype)
    if dtype is None:
        return None
    shape = (1, *entry.shape[1:])
    size = math.prod(shape) * dtype.itemsize
    return _read(entry, entry.start + row * size, size).view(dtype).reshape(shape)


def _read(entry: TensorEntry, start: int, size: int) -> torch.Tensor:
    """``size`` bytes of the entry's file, uint8. No memory map: its pages would count as the process's own memory."""
    data = torch.empty(size, dtype=torch.uint8)
    try:
        with entry.file.open("rb", buffering=0) as stream:
            if read_at(stream.fileno(), data.numpy().data, start) < size:
                raise ModelError(f"{entry.file} is cut short", hint="download the checkpoint again")
    except OSError as error:
        raise ModelError(f"cannot read {entry.file}: {error.strerror}") from None
    return data
