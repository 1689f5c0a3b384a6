"""Files of raw tensors, one behind the other, whose list is kept elsewhere. One tensor is in memory at a time."""

from __future__ import annotations

import math
import os
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from chanfmt.base.files import read_at, write_at
from chanfmt.models.streaming.spool import bytes_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from chanfmt.models.streaming.spool import Spool

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
_PART = 1 << 22


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file: its key in a spool, its dtype as torch calls it, and its shape."""

    key: tuple[str, str | int]
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorFile:
    """What is known of a file of tensors: its name, size and CRC-32, and its tensors in order."""

    name: str
    nbytes: int
    crc32: int
    tensors: tuple[TensorEntry, ...]


def write_tensors(path: Path, spool: Spool, keys: Sequence[tuple[str, str | int]]) -> TensorFile:
    """Write the tensors ``keys`` of ``spool`` to the file ``path``, and flush it to the disk. Raises `OSError`."""
    tensors = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        offset = crc = 0
        for key in keys:
            tensor = spool.get(key)
            data = bytes_of(tensor)
            offset += write_at(descriptor, data, offset)
            crc = zlib.crc32(data, crc)
            tensors.append(TensorEntry(key, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return TensorFile(path.name, offset, crc, tuple(tensors))


def read_tensors(path: Path, file: TensorFile) -> Iterator[tuple[tuple[str, str | int], torch.Tensor]]:
    """The keys and the tensors of the file ``path``, which `check_tensors` found to be whole. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        offset = 0
        for item in file.tensors:
            tensor = torch.empty(item.shape, dtype=_DTYPES[item.dtype])
            if read_at(descriptor, bytes_of(tensor), offset) < tensor.nbytes:
                raise OSError(f"{path} became shorter")
            offset += tensor.nbytes
            yield item.key, tensor
    finally:
        os.close(descriptor)


def check_tensors(path: Path, file: TensorFile) -> None:
    """Raise `ValueError`, `KeyError` or `OSError` if the file ``path`` is not what `write_tensors` wrote."""
    size = sum(math.prod(item.shape) * _DTYPES[item.dtype].itemsize for item in file.tensors)
    crc = count = 0
    with path.open("rb") as stream:
        while part := stream.read(_PART):
            crc, count = zlib.crc32(part, crc), count + len(part)
    if (count, crc) != (file.nbytes, file.crc32) or size != count:
        raise ValueError(f"{file.name} is not as it was written")
