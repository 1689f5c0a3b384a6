"""Tensors by key: in memory up to a limit, and beyond it in a file without a name, which cannot outlive the process."""

from __future__ import annotations

import contextlib
import mmap
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING

import numpy as np
import torch

from chanfmt.base.errors import ChanfmtError
from chanfmt.base.files import check_space, read_at, write_at

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator
    from pathlib import Path

_HINT = "free space there, raise --spool-limit, use less text, or choose an output on another disk"
_LARGE = 1 << 16
"""Bytes of a tensor that gets pages of its own."""


class Spool:
    """Keeps tensors in memory or on disk. Use it as a context.

    The file is read and written, not mapped, because pages of a mapped file count as the process's own memory.

    Args:
        limit: Bytes kept in memory.
        directory: Directory of the file, if one is needed.
    """

    def __init__(self, limit: int, directory: Path) -> None:
        self._limit = limit
        self._directory = directory
        self._held: dict[Hashable, torch.Tensor] = {}
        self._placed: dict[Hashable, tuple[int, torch.dtype, torch.Size]] = {}
        self._free: dict[int, list[int]] = defaultdict(list)
        self._file: IO[bytes] | None = None
        self._end = 0
        self.in_memory = 0
        """Bytes held in memory now."""

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear()
        if self._file is not None:
            # The file's content is not needed any more, and an error here would hide an error of the body.
            with contextlib.suppress(OSError):
                self._file.close()

    @property
    def on_disk(self) -> int:
        """Bytes of the file."""
        return self._end

    def check_room(self, nbytes: int) -> None:
        """Raise `ChanfmtError` if ``nbytes`` fit neither in memory, up to the limit, nor on the disk."""
        beyond = nbytes - self._limit - self._end
        if beyond > 0:
            check_space(self._directory, beyond, hint=_HINT)

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Keep the values of ``tensor`` under ``key``, in place of an earlier tensor.

        Raises:
            ChanfmtError: The disk is full or cannot be written.
        """
        held = self._held.get(key)
        if held is not None and held.shape == tensor.shape and held.dtype == tensor.dtype:
            held.copy_(tensor.detach())
            return
        self.drop(key)
        size = tensor.nbytes
        if self.in_memory + size <= self._limit:
            self._held[key] = _of_its_own(tensor)
            self.in_memory += size
            return
        slot = self._free[size].pop() if self._free[size] else self._end
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115
            write_at(self._file.fileno(), bytes_of(tensor), slot)
        except OSError as error:
            raise ChanfmtError(
                f"cannot write intermediate results in {self._directory}: {error.strerror}",
                hint=_HINT,
            ) from None
        self._end = max(self._end, slot + size)
        self._placed[key] = (slot, tensor.dtype, tensor.shape)

    def get(self, key: Hashable) -> torch.Tensor:
        """A copy of the tensor under ``key``, on the CPU. Raises `ChanfmtError` if it cannot be read back."""
        if key in self._held:
            return self._held[key].clone()
        slot, dtype, shape = self._placed[key]
        tensor = torch.empty(shape, dtype=dtype)
        assert self._file is not None
        try:
            whole = read_at(self._file.fileno(), bytes_of(tensor), slot) == tensor.nbytes
        except OSError as error:
            raise ChanfmtError(f"cannot read intermediate results back in {self._directory}: {error.strerror}") from None
        if not whole:
            raise ChanfmtError(f"intermediate results in {self._directory} cannot be read back: the file is too short")
        return tensor

    def nbytes(self, key: Hashable) -> int:
        """Bytes of the tensor under ``key``."""
        if key in self._held:
            return self._held[key].nbytes
        _, dtype, shape = self._placed[key]
        return shape.numel() * dtype.itemsize

    def drop(self, key: Hashable) -> None:
        """Forget the tensor under ``key``, if there is one."""
        if key in self._held:
            self.in_memory -= self._held.pop(key).nbytes
        elif key in self._placed:
            slot, dtype, shape = self._placed.pop(key)
            self._free[shape.numel() * dtype.itemsize].append(slot)

    def clear(self) -> None:
        """Forget everything."""
        for key in (*self._held, *self._placed):
            self.drop(key)


class Spooled(Mapping[str, np.ndarray]):
    """Arrays by name. They lie in ``spool`` under ``key`` and each name, and are read when they are asked for."""

    def __init__(self, spool: Spool, key: Hashable, arrays: Mapping[str, np.ndarray]) -> None:
        self._spool = spool
        self._key = key
        self._names = tuple(arrays)
        self.nbytes = 0
        for name, values in arrays.items():
            tensor = torch.from_numpy(np.array(values))
            spool.put((key, name), tensor)
            self.nbytes += tensor.nbytes

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        values: np.ndarray = self._spool.get((self._key, name)).numpy()
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _of_its_own(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of ``tensor`` on the CPU. A large copy lies outside the heap, where it would keep freed pieces apart."""
    if tensor.nbytes < _LARGE:
        return tensor.detach().to("cpu", copy=True)
    pages = torch.frombuffer(mmap.mmap(-1, tensor.nbytes), dtype=torch.uint8)
    return pages.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of ``tensor``: its own memory if it is contiguous and on the CPU, otherwise those of a copy."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
