"""The processes that torchrun starts for one piece of work: what they tell each other, and what happens if one is lost."""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed

from chanfmt.base.errors import ChanfmtError, UsageError, first_line
from chanfmt.base.processes import processes, rank
from chanfmt.models.out_of_memory import out_of_memory_recognised

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=30)
"""How long the processes wait for each other: longer than a partial atlas takes to write. A killed process is missed at once."""
FAREWELL = datetime.timedelta(seconds=5)
"""How long a process that is told to stop waits for signs of the others. torchrun kills it after 30 seconds."""
FLAT_BYTES = 64 << 20
"""Bytes of a buffer in which small tensors are summed together: thousands of messages would take longer than their bytes."""


class LostProcessError(ChanfmtError):
    """Another process died or fell silent. What it had summed is lost."""


class Group:
    """The processes that work together, seen from one of them. In this class it is the only one.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        leads_machine: Whether this process is the first on its machine.
        device: The device of this process, as ``--device`` takes it.
    """

    rank = 0
    size = 1
    leads_machine = True

    def __init__(self, device: str = "auto") -> None:
        self.device = device

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """First sequence and end of this process's part of the sequences ``start`` to ``stop`` (excluded). It may be empty."""
        count = stop - start
        return start + count * self.rank // self.size, start + count * (self.rank + 1) // self.size

    def exchange(self, value: T) -> list[T]:
        """Exchange ``value`` with all processes, which must all call this. Returns their values by rank. Raises `LostProcessError`."""
        return [value]

    def together(self, work: Callable[[], T]) -> T:
        """Run ``work``, which must not call this group, in all processes. Returns its result once all have succeeded.

        Raises:
            ChanfmtError: ``work`` raised it in one process. It is raised in all of them. For an error of another kind, the
                other processes raise a `ChanfmtError` that names it.
            torch.OutOfMemoryError: Likewise.
            LostProcessError: Another process did not get there.
        """
        with out_of_memory_recognised():
            return work()

    def collect(self, sums: Sequence[torch.Tensor], maxima: Sequence[torch.Tensor]) -> None:
        """Add up ``sums`` and take the largest of ``maxima`` over all processes, in place in the first process.

        The sums of the other processes become zero. Shapes and dtypes must be the same in all. Raises `LostProcessError`.
        """

    def spread(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give ``tensors`` of the first process to all processes, in place. Shapes and dtypes must be the same in all.

        Raises:
            LostProcessError: Another process did not get there.
        """

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add up ``tensors`` over all processes, in place in all of them, which hold the same bits afterwards."""
        self.collect(tensors, ())
        self.spread(tensors)


class _Processes(Group):
    """One of several processes. All of them must call the methods in the same order."""

    def __init__(self, device: str, patience: datetime.timedelta = TIMEOUT) -> None:
        """Find the other processes. Raises `ChanfmtError` if they do not come, and `UsageError` if they cannot share the device."""
        super().__init__(_own_device(device))
        self.rank = rank()
        self.size = processes()
        self.leads_machine = _local_rank() == 0
        self._patience = patience
        cuda = self.device.startswith("cuda")
        try:
            # Messages travel over gloo, whatever the device: gloo tells whose connection broke, and nccl does not.
            # The gloo group stays for the next build of a script: a second one would find the addresses of the first, and hang.
            if not distributed.is_initialized():
                distributed.init_process_group("gloo", timeout=patience)
            if cuda:
                torch.cuda.set_device(self.device)
            self._sums = distributed.new_group(backend="nccl", timeout=patience) if cuda else None
        except (RuntimeError, ValueError) as error:
            raise ChanfmtError(f"rank {self.rank} of {self.size} cannot reach the others: {first_line(error)}") from None

    def exchange(self, value: T) -> list[T]:
        # Values go through the first process rather than from all to all, so it can tell which process is lost.
        if self.rank:
            self._send(value, 0)
            values: list[T] = self._receive(0)
            return values
        values = [value, *(self._receive(other) for other in range(1, self.size))]
        for other in range(1, self.size):
            self._send(values, other)
        return values

    def together(self, work: Callable[[], T]) -> T:
        failure: Exception | None = None
        try:
            with out_of_memory_recognised():
                result = work()
        except Exception as error:
            failure = error
        except KeyboardInterrupt:
            self._look_for_lost()
            raise
        try:
            failures = [told for told in self.exchange(_told(failure, self.rank)) if told is not None]
        except LostProcessError:
            # The user has to mend the failure of this process, which may be why the other one is gone.
            if failure is not None and not isinstance(failure, torch.OutOfMemoryError):
                raise failure from None
            raise
        if not failures:
            return result
        final = next((told for told in failures if not told.out_of_memory), None)
        if final is None:
            raise failure or torch.OutOfMemoryError(failures[0].message)
        if failure is not None and not isinstance(failure, torch.OutOfMemoryError):
            raise failure
        raise final.error()

    def collect(self, sums: Sequence[torch.Tensor], maxima: Sequence[torch.Tensor]) -> None:
        # gloo takes a message that is too short, and leaves the rest of the sums as the memory was.
        shapes = self.exchange([tuple(tensor.shape) for tensor in (*sums, *maxima)])
        if any(theirs != shapes[0] for theirs in shapes):
            raise RuntimeError("the processes hold sums of different shapes")
        # The processes send one after the other. If a process is lost in the middle of a collective operation, gloo breaks
        # the connections of other processes too, and some of them wait forever.
        for tensors, add in ((sums, torch.Tensor.add_), (maxima, _largest)):
            for bucket in _buckets(tensors):
                flat = bucket[0] if len(bucket) == 1 else torch.cat([tensor.reshape(-1) for tensor in bucket])
                if self.rank:
                    with self._missing(0):
                        distributed.send(flat, 0, self._sums)
                    for tensor in bucket:
                        tensor.zero_()
                    continue
                theirs = torch.empty_like(flat)
                for other in range(1, self.size):
                    with self._missing(other):
                        distributed.recv(theirs, other, self._sums)
                    add(flat, theirs)
                if len(bucket) > 1:
                    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                        tensor.copy_(part.view_as(tensor))
        # nccl only queues the operations: if this process were lost now, the first one would wait for its sums forever.
        if self.rank and self._sums is not None:
            torch.cuda.synchronize()
        self.exchange(None)

    def spread(self, tensors: Sequence[torch.Tensor]) -> None:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
            if self.rank:
                with self._missing(0):
                    distributed.recv(flat, 0, self._sums)
                for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))
                continue
            for other in range(1, self.size):
                with self._missing(other):
                    distributed.send(flat, other, self._sums)
        # As in `collect`.
        if self._sums is not None:
            torch.cuda.synchronize()
        self.exchange(None)

    def close(self) -> None:
        """Give up the group that belongs to one piece of work, after it succeeded. After a failure the others may be gone."""
        if self._sums is not None:
            distributed.destroy_process_group(self._sums)

    def _send(self, value: Any, other: int) -> None:
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        with self._missing(other):
            distributed.send(torch.tensor([len(data)]), other)
            distributed.send(data, other)

    def _receive(self, other: int) -> Any:
        length = torch.zeros(1, dtype=torch.int64)
        with self._missing(other):
            distributed.recv(length, other)
            data = torch.zeros(int(length), dtype=torch.uint8)
            distributed.recv(data, other)
        return pickle.loads(data.numpy().tobytes())

    def _look_for_lost(self) -> None:
        """Raise `LostProcessError` if torchrun ends this process because another one died, not because somebody asked for it."""
        for other in range(1, self.size) if self.rank == 0 else (0,):
            try:
                message = torch.zeros(1, dtype=torch.int64)
                request = distributed.isend(message, other) if self.rank else distributed.irecv(message, other)
                assert request is not None
                request.wait(FAREWELL)
            except RuntimeError as error:
                # The other process is busy with something that no signal ends. Afterwards no connection tells anything.
                if "Timed out" in str(error):
                    return
                raise self._lost(other) from None

    @contextlib.contextmanager
    def _missing(self, other: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            raise self._lost(other) from None

    def _lost(self, other: int) -> LostProcessError:
        return LostProcessError(
            f"rank {other} of {self.size} was lost: it was killed, failed, or did not answer for {self._patience.total_seconds() / 60:.0f} minutes"
        )


@contextlib.contextmanager
def joined(device: str, patience: datetime.timedelta = TIMEOUT) -> Iterator[Group]:
    """Join the processes that torchrun started with this one, and yield their group; without torchrun, this one alone.

    Args:
        device: As ``--device``. On a machine with GPUs, each of several processes gets a GPU of its own.
        patience: How long the processes wait for each other. The first group of a process decides.

    Raises:
        UsageError: The processes cannot share the device.
        ChanfmtError: They cannot reach each other.
    """
    if processes() == 1:
        yield Group(device)
        return
    group = _Processes(device, patience)
    yield group
    group.close()


@dataclass(frozen=True)
class _Failure:
    """A failure as the other processes are told of it. An exception of another package may not survive pickling."""

    message: str
    hint: str | None
    exit_code: int
    out_of_memory: bool

    def error(self) -> ChanfmtError:
        error = ChanfmtError(self.message)
        error.hint = self.hint
        error.exit_code = self.exit_code
        return error


def _told(error: Exception | None, rank: int) -> _Failure | None:
    if error is None:
        return None
    if isinstance(error, ChanfmtError):
        return _Failure(error.message, error.hint, error.exit_code, out_of_memory=False)
    if isinstance(error, torch.OutOfMemoryError):
        return _Failure(first_line(error), None, 1, out_of_memory=True)
    return _Failure(f"rank {rank} failed: {type(error).__name__}: {first_line(error)}", None, 1, out_of_memory=False)


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Consecutive tensors (of one dtype and device) that fit into `FLAT_BYTES`. A larger tensor is a bucket of its own."""
    bucket: list[torch.Tensor] = []
    nbytes = 0
    for tensor in tensors:
        if bucket and nbytes + tensor.nbytes > FLAT_BYTES:
            yield bucket
            bucket, nbytes = [], 0
        bucket.append(tensor)
        nbytes += tensor.nbytes
    if bucket:
        yield bucket


def _largest(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.maximum(ours, theirs, out=ours)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _own_device(device: str) -> str:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if device not in ("auto", "cuda"):
        raise UsageError(
            f"--device {device} cannot be shared by {processes()} processes", hint="leave out --device, or use --device cpu"
        )
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if here > gpus:
        raise UsageError(
            f"{here} processes were started on a machine with {gpus} GPUs",
            hint=f"use torchrun --nproc-per-node {gpus}, or --device cpu" if gpus else "use --device cpu",
        )
    return f"cuda:{_local_rank()}"
