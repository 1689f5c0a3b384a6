"""The processes that torchrun starts for one build: what they tell each other, and what becomes of it when one is lost."""

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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=30)
"""How long the others wait for one: longer than the first writes a checkpoint. One that was killed is missed at once."""
FAREWELL = datetime.timedelta(seconds=5)
"""How long a process that is told to stop waits to hear that all others live: torchrun kills it after 30 seconds."""
FLAT_BYTES = 64 << 20
"""Small tensors are summed in buffers of up to this size: thousands of messages would take longer than their bytes."""


def processes() -> int:
    """How many processes torchrun started for this build; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """Which of the `processes` this is. The first, 0, speaks and writes for all."""
    return int(os.environ["RANK"]) if processes() > 1 else 0


class LostProcessError(ChanfmtError):
    """Another process died or fell silent, and with it what it had summed."""


class Group:
    """The processes that measure together, seen from one of them. This one is alone.

    Attributes:
        rank: Which one it is.
        size: How many there are.
        leads_machine: Whether it is the first on its machine.
        device: What to pass for ``--device``.
    """

    rank = 0
    size = 1
    leads_machine = True

    def __init__(self, device: str = "auto") -> None:
        self.device = device

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """This process's part of the sequences from ``start`` to ``stop``; it may be empty."""
        count = stop - start
        return start + count * self.rank // self.size, start + count * (self.rank + 1) // self.size

    def exchange(self, value: T) -> list[T]:
        """The values that all processes call this with, in order of rank. Raises `LostProcessError`."""
        return [value]

    def together(self, work: Callable[[], T]) -> T:
        """What ``work`` returns here, once it has succeeded everywhere; it must not call this group itself.

        Raises:
            ChanfmtError: Everywhere, where it was raised in one process.
            torch.OutOfMemoryError: Likewise.
            LostProcessError: Another process did not get there.
        """
        return work()

    def collect(self, sums: Sequence[torch.Tensor], maxima: Sequence[torch.Tensor]) -> None:
        """Add up ``sums`` and take the largest of ``maxima`` over all processes, in place in the first.

        Those of the others become zero. Shapes and dtypes are the same everywhere. Raises `LostProcessError`.
        """


class _Processes(Group):
    """One of several processes. They must call the methods in the same order."""

    def __init__(self, device: str) -> None:
        """Find the others. Raises `ChanfmtError` where they do not come, `UsageError` for a device they cannot share."""
        super().__init__(_own_device(device))
        self.rank = rank()
        self.size = processes()
        self.leads_machine = _local_rank() == 0
        cuda = self.device.startswith("cuda")
        try:
            # Messages travel over gloo whatever the device: it tells whose connection broke, nccl does not.
            # It stays for the next build of a script: a second one would find addresses of the first, and hang.
            if not distributed.is_initialized():
                distributed.init_process_group("gloo", timeout=TIMEOUT)
            if cuda:
                torch.cuda.set_device(self.device)
            self._sums = distributed.new_group(backend="nccl", timeout=TIMEOUT) if cuda else None
        except (RuntimeError, ValueError) as error:
            raise ChanfmtError(f"rank {self.rank} of {self.size} cannot reach the others: {first_line(error)}") from None

    def exchange(self, value: T) -> list[T]:
        # Through the first process rather than all to all: so it can tell which one is lost.
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
            result = work()
        except (ChanfmtError, torch.OutOfMemoryError) as error:
            failure = error
        except KeyboardInterrupt:
            self._look_for_lost()
            raise
        try:
            failures = [told for told in self.exchange(_told(failure)) if told is not None]
        except LostProcessError:
            # What went wrong here is what the user has to mend; it may be why the other process is gone.
            if isinstance(failure, ChanfmtError):
                raise failure from None
            raise
        if not failures:
            return result
        final = next((told for told in failures if not told.out_of_memory), None)
        if final is None:
            raise failure or torch.OutOfMemoryError(failures[0].message)
        raise failure if isinstance(failure, ChanfmtError) else final.error()

    def collect(self, sums: Sequence[torch.Tensor], maxima: Sequence[torch.Tensor]) -> None:
        # One after the other, not as a collective operation: where one is lost in the middle of one of
        # those, gloo breaks connections of the others too, and some wait for good.
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
        # nccl only queues what it is told: were one lost now, the first would wait for its sums without an end.
        if self.rank and self._sums is not None:
            torch.cuda.synchronize()
        self.exchange(None)

    def close(self) -> None:
        """Give up what belongs to one build, after a success: after a failure there is nobody to say goodbye to."""
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
        """Raise `LostProcessError` where torchrun ends this process because another died, not because somebody asked."""
        for other in range(1, self.size) if self.rank == 0 else (0,):
            try:
                message = torch.zeros(1, dtype=torch.int64)
                request = distributed.isend(message, other) if self.rank else distributed.irecv(message, other)
                assert request is not None
                request.wait(FAREWELL)
            except RuntimeError as error:
                # Busy where no signal reaches it; after this no connection tells anything.
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
            f"rank {other} of {self.size} was lost: it was killed, failed, or did not answer for {TIMEOUT.seconds // 60} minutes"
        )


@contextlib.contextmanager
def joined(device: str) -> Iterator[Group]:
    """The group of this process: those that torchrun started it with, or itself alone.

    Args:
        device: ``--device``; of several processes on a machine with GPUs each gets its own.

    Raises:
        UsageError, ChanfmtError: They cannot share the device, or cannot reach each other.
    """
    if processes() == 1:
        yield Group(device)
        return
    group = _Processes(device)
    yield group
    group.close()


@dataclass(frozen=True)
class _Failure:
    """What the others need to know of a failure; an exception of another package may not survive pickling."""

    message: str
    hint: str | None
    exit_code: int
    out_of_memory: bool

    def error(self) -> ChanfmtError:
        error = ChanfmtError(self.message, hint=self.hint)
        error.exit_code = self.exit_code
        return error


def _told(error: Exception | None) -> _Failure | None:
    if error is None:
        return None
    if isinstance(error, ChanfmtError):
        return _Failure(error.message, error.hint, error.exit_code, out_of_memory=False)
    return _Failure(first_line(error), None, 1, out_of_memory=True)


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Consecutive tensors (of one dtype and device) that fit into `FLAT_BYTES`; a larger one stays alone."""
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
            f"--device {device} cannot be shared by {processes()} processes", hint="leave it out, or use --device cpu"
        )
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if here > gpus:
        raise UsageError(
            f"{here} processes were started on a machine with {gpus} GPUs",
            hint=f"use torchrun --nproc-per-node {gpus}, or --device cpu" if gpus else "use --device cpu",
        )
    return f"cuda:{_local_rank()}"
