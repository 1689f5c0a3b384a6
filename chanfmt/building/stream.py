"""The pass over the calibration tokens one block at a time, for a model whose graph or whose weights are larger than memory.

In the forward direction, the inputs of every block are kept. Then the loss gives the gradient behind the last block, and the
blocks run again in reverse order, each from its kept inputs, with autograd. If the weights are not in memory, the pass reads
them twice, once in each direction. Opening the model (`chanfmt.models.streaming.streamed`) reads all weights once more, and the
metrics of the weights alone read those of the FFNs, so a build reads them four times.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from chanfmt.base.errors import ChanfmtError, ModelError
from chanfmt.base.files import atomic_file
from chanfmt.base.narrate import say
from chanfmt.building.capture import Capture
from chanfmt.building.derive import reduce
from chanfmt.building.gradients import gradient_path, remove_gradients
from chanfmt.building.measure import Measurement, check_no_overflow, out_of_memory, split_ranges
from chanfmt.building.state import PassState, StreamState
from chanfmt.building.statistics import FFNStatistics
from chanfmt.models.out_of_memory import free_cached_memory, out_of_memory_recognised
from chanfmt.models.run import eager_experts, explained, tokens_at_once, usual_batch
from chanfmt.models.streaming.chain import Call
from chanfmt.models.streaming.spool import Spooled, bytes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import numpy as np

    from chanfmt.building.column_sums import Wanted
    from chanfmt.building.columns import ColumnPlan
    from chanfmt.building.loss import Loss
    from chanfmt.data.tokens import CalibrationTokens
    from chanfmt.format.records import LabelSettings
    from chanfmt.models.ffn import FFN
    from chanfmt.models.streaming.chain import Chain
    from chanfmt.models.streaming.spool import Spool
    from chanfmt.models.streaming.streamed import StreamedModel


class Shelf(Sequence[FFNStatistics]):
    """The statistics of finished FFNs, in a spool. They are made anew, on the CPU, whenever they are asked for.

    In memory they would grow with the number of blocks, which streaming has to avoid.
    """

    def __init__(self, spool: Spool, wanted: Wanted | None = None) -> None:
        self.spool = spool
        self.wanted = wanted
        self.states: list[Spooled] = []
        self._ffns: list[FFN] = []

    def put_first(self, ffn: FFN, state: Mapping[str, np.ndarray]) -> None:
        """Put ``state``, `FFNStatistics.state` of ``ffn``, before the states that are on the shelf."""
        self.states.insert(0, Spooled(self.spool, ("statistics", len(self)), state))
        self._ffns.insert(0, ffn)

    def __len__(self) -> int:
        return len(self._ffns)

    def __getitem__(self, index: int) -> FFNStatistics:  # type: ignore[override]
        statistics = FFNStatistics(self._ffns[index], torch.device("cpu"), self.wanted)
        statistics.restore(dict(self.states[index]))
        return statistics


@dataclass
class StreamedMeasurement(Measurement):
    """The result of a streamed pass; between two steps, its result so far.

    Attributes:
        statistics: The statistics of the FFNs of finished blocks, which are the last blocks of the model; at the end, of all.
        block: The first finished block; the number of blocks if none is finished.
        fresh: Whether a block was finished since the last partial atlas.
        gradient: Gives the gradient of the loss by the input of that block, batch by batch in order.
        gradient_sha256: SHA-256 of the file that `keep_beside` wrote last, hexadecimal.
    """

    statistics: Shelf
    block: int = 0
    fresh: bool = False
    gradient: Callable[[], Iterator[torch.Tensor]] = lambda: iter(())
    gradient_sha256: str = ""

    @property
    def nbytes(self) -> int:
        """Approximate number of bytes in `state`."""
        return sum(state.nbytes for state in self.statistics.states)

    def laid_aside(self, number: int, variables: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return Spooled(self.statistics.spool, ("variables", number), variables)

    def state(self) -> PassState:
        return PassState(
            self.sequences,
            self.batch_size,
            self.loss,
            list(self.statistics.states),
            StreamState(self.block, self.gradient_sha256),
        )

    def keep_beside(self, partial: Path) -> None:
        """Write the gradient beside ``partial``, and remember its digest. Raises `ChanfmtError` if it cannot be written."""
        digest = hashlib.sha256()
        with atomic_file(gradient_path(partial, self.block), overwrite=True) as temporary, temporary.open("wb") as file:
            for gradient in self.gradient():
                data = bytes_of(gradient)
                digest.update(data)
                file.write(data)
        self.gradient_sha256 = digest.hexdigest()

    def kept(self, partial: Path) -> None:
        """Remove the gradients that belonged to earlier versions of ``partial``."""
        self.fresh = False
        remove_gradients(partial, self.block)


def measure_streamed(
    streamed: StreamedModel,
    tokens: CalibrationTokens,
    spool: Spool,
    *,
    settings: LabelSettings,
    loss: Loss,
    batch_size: int | None = None,
    first_size: int | None = None,
    progress: Callable[[int], object] = lambda sequences: None,
    start: PassState | None = None,
    gradient: Path | None = None,
    after_batch: Callable[[StreamedMeasurement], object] = lambda measurement: None,
    columns: ColumnPlan | None = None,
) -> StreamedMeasurement:
    """Accumulate the statistics of all FFNs over ``tokens``, as `chanfmt.building.measure.measure` does.

    Args:
        spool: Keeps block inputs and the statistics of finished blocks. It is empty at first, and must stay open while the
            result is used.
        settings: How channels are labelled. Redundancy is reduced to the core as soon as a block is finished.
        loss: The loss to differentiate.
        batch_size: Sequences in a batch; None begins with ``first_size``, and halves it when memory runs out.
        first_size: As for `chanfmt.building.measure.measure`.
        progress: Called with the number of sequences that passed through a block, in either direction; see `steps`.
        start: The state of an earlier pass over the same tokens. Forward passes are repeated as far as they are needed.
        gradient: The file that `StreamedMeasurement.keep_beside` wrote with that state.
        after_batch: Called after every batch of every block, and after every finished block.
        columns: The columns to accumulate for besides.

    Raises:
        ModelError: The loss or a gradient is not finite.
        ChanfmtError: Memory or the spool's disk runs out, or the content of ``gradient`` has changed.
    """
    ids = torch.from_numpy(tokens.ids).long()
    size = batch_size or first_size or usual_batch(streamed.chain.device, ids.shape[1])
    if start is not None:
        size = start.batch_size
    while True:
        run = _Pass(streamed, spool, ids, _batches(tokens.split_of, size), settings, loss, progress, after_batch, columns)
        try:
            with out_of_memory_recognised(), eager_experts(streamed.chain.model):
                return run.result(size, start, gradient)
        except torch.OutOfMemoryError:
            if batch_size is not None or start is not None or size == 1:
                first = "--stream, " if streamed.chain.resident else ""
                levers = f"{first}a smaller --batch-size, --seq-len or --spool-limit"
                raise out_of_memory(size, levers, resumed=start is not None) from None
        say(f"note: out of memory with {size} sequences in a batch; starting over with {size // 2}")
        free_cached_memory(streamed.chain.device)
        spool.clear()
        progress(-run.done)
        size //= 2


def steps(streamed: StreamedModel, sequences: int) -> int:
    """Sum of the numbers that `measure_streamed` calls ``progress`` with."""
    return 2 * len(streamed.chain) * sequences


@dataclass(frozen=True)
class _Batch:
    """Sequences ``start`` to ``stop`` (excluded), which belong to one split."""

    start: int
    stop: int
    split: int

    @property
    def sequences(self) -> int:
        return self.stop - self.start


def _batches(split_of: np.ndarray, size: int) -> list[_Batch]:
    """The batches of `chanfmt.building.measure.measure`: those of the first split, then those of the next."""
    return [
        _Batch(start, min(start + size, last), split)
        for split, (first, last) in enumerate(split_ranges(split_of))
        for start in range(first, last, size)
    ]


class _Pass:
    """One pass. Under (i, b) the spool holds the input of block i in batch b, or later the gradient of the loss by that input."""

    def __init__(
        self,
        streamed: StreamedModel,
        spool: Spool,
        ids: torch.Tensor,
        batches: list[_Batch],
        settings: LabelSettings,
        loss: Loss,
        progress: Callable[[int], object],
        after_batch: Callable[[StreamedMeasurement], object],
        columns: ColumnPlan | None,
    ) -> None:
        self.chain: Chain = streamed.chain
        self.spool = spool
        self.ids = ids
        self.batches = batches
        self.settings = settings
        self.loss = loss
        self.progress = progress
        self.after_batch = after_batch
        self.columns = columns
        self.wanted = None if columns is None else columns.wanted
        self.done = 0
        self.ffns: list[list[FFN]] = [[] for _ in range(len(self.chain))]
        for ffn in streamed.ffns:
            number = self.chain.number_of(ffn.container)
            assert number is not None
            self.ffns[number].append(ffn)
        self.lowest = next(number for number, ffns in enumerate(self.ffns) if ffns)
        """The first block with an FFN. No block before it needs a gradient."""

    def result(self, size: int, start: PassState | None, gradient: Path | None) -> StreamedMeasurement:
        count = len(self.chain)
        found = StreamedMeasurement(
            Shelf(self.spool, self.wanted), self.loss.terms(self.ids.shape[1]), size, len(self.ids), block=count
        )
        found.gradient = lambda: (self.spool.get((found.block, place)) for place in range(len(self.batches)))
        self.found = found
        if start is None:
            calls = self._begin()
            for number in range(count):
                self._forward(number, calls)
            self._end()
        else:
            assert start.stream is not None
            assert gradient is not None
            found.block, found.loss, found.gradient_sha256 = start.stream.block, start.loss, start.stream.gradient_sha256
            self._restore(found.block, start)
            if found.block > self.lowest:
                calls = self._begin()
                for number in range(found.block - 1):
                    self._forward(number, calls)
                self._read_gradient(gradient, start.stream)
            self._advance((2 * count - found.block) * len(self.ids) - self.done)
        for number in reversed(range(self.lowest, found.block)):
            for ffn, statistics in reversed(self._backward(number, calls)):
                found.statistics.put_first(ffn, statistics.state())
            found.block, found.fresh = number, True
            for place in range(len(self.batches)):
                self.spool.drop((number + 1, place))
            self.after_batch(found)
        self._advance(self.lowest * len(self.ids))
        return found

    def _begin(self) -> list[list[Call]]:
        """Keep the inputs of the first block. Returns the calls of the blocks, for each batch.

        Raises:
            ChanfmtError: The disk has no room for the inputs of all blocks.
        """
        calls: list[list[Call]] = []
        for place, batch in enumerate(self.batches):
            hidden, own = self.chain.calls(partial(self.loss.backward, self._ids(batch)))
            if not place:
                # The output of the last block is kept too. A pass that goes on needs the blocks that are not finished.
                self.spool.check_room(hidden.nbytes // batch.sequences * len(self.ids) * (self.found.block + 1))
            self.spool.put((0, place), hidden)
            # Masks and positions are large, and usually the same for all batches of one size.
            calls.append(next((other for other in (*calls[:1], *calls[-1:]) if all(map(Call.same, own, other))), own))
        return calls

    @torch.no_grad()
    def _forward(self, number: int, calls: list[list[Call]]) -> None:
        with self.chain.loaded(number):
            for place, batch in enumerate(self.batches):
                with explained(tokens_at_once(self._ids(batch))):
                    hidden = self.chain.run(number, calls[place][number], self._get(number, place))
                self.spool.put((number + 1, place), hidden)
                self._advance(batch.sequences)
                self.after_batch(self.found)

    def _end(self) -> None:
        """Compute the loss, and its gradient by the output of the last block."""
        count = len(self.chain)
        for place, batch in enumerate(self.batches):
            hidden = self._get(count, place).requires_grad_(True)
            with self.chain.ending(hidden):
                nats = self.loss.backward(self._ids(batch))
            if not math.isfinite(nats):
                raise ModelError(
                    f"the loss of sequences {batch.start} to {batch.stop - 1} is not finite; an activation overflowed",
                    hint="use --dtype float32",
                )
            assert hidden.grad is not None
            self.found.loss += nats
            self.spool.put((count, place), hidden.grad)
            self.after_batch(self.found)

    def _backward(self, number: int, calls: list[list[Call]]) -> list[tuple[FFN, FFNStatistics]]:
        """Run block ``number`` again from its inputs, forward and backward. The gradients take the place of the inputs."""
        ffns = self.ffns[number]
        statistics = [FFNStatistics(ffn, self.chain.device, self.wanted) for ffn in ffns]
        with self.chain.loaded(number):
            capture = Capture(self.chain.model, ffns, statistics)
            with capture.running():
                for place, batch in enumerate(self.batches):
                    if batch.split:
                        self._choose_cores(statistics)
                    rows = None if self.columns is None else self.columns.batch(batch.start, batch.stop, self.chain.device)
                    capture.begin(batch.sequences, batch.split, rows)
                    gradient = self._back(number, place, batch, calls[place][number])
                    check_no_overflow(ffns, statistics, batch.start, batch.stop)
                    if gradient is not None:
                        self.spool.put((number, place), gradient)
                    self._advance(batch.sequences)
                    self.after_batch(self.found)
        self._choose_cores(statistics)
        for item in statistics:
            reduce(item, self.settings)
        return list(zip(ffns, statistics, strict=True))

    def _back(self, number: int, place: int, batch: _Batch, call: Call) -> torch.Tensor | None:
        hidden = self._get(number, place).requires_grad_(number > self.lowest)
        with explained(tokens_at_once(self._ids(batch))), torch.enable_grad():
            # A block may change its input in place, which autograd allows on a copy only.
            output = self.chain.run(number, call, hidden.clone())
            output.backward(self._get(number + 1, place))
        return hidden.grad

    def _choose_cores(self, statistics: list[FFNStatistics]) -> None:
        for item in statistics:
            for member in item.members:
                if member.core is None:
                    member.choose_core(self.settings.rho)

    def _restore(self, block: int, start: PassState) -> None:
        """Move the states in ``start`` into the spool. None of them stays in memory."""
        for ffn in reversed([ffn for ffns in self.ffns[block:] for ffn in ffns]):
            self.found.statistics.put_first(ffn, start.ffns.pop())

    def _read_gradient(self, path: Path, state: StreamState) -> None:
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                for place in range(len(self.batches)):
                    gradient = torch.empty_like(self.spool.get((0, place)))
                    data = bytes_of(gradient)
                    file.readinto(data)
                    digest.update(data)
                    self.spool.put((state.block, place), gradient)
        except OSError as error:
            raise ChanfmtError(f"cannot read {path}: {error.strerror}", hint="start over without --resume") from None
        if digest.hexdigest() != state.gradient_sha256:
            raise ChanfmtError(f"{path} has changed since the build wrote it", hint="start over without --resume")

    def _get(self, number: int, place: int) -> torch.Tensor:
        return self.spool.get((number, place)).to(self.chain.device)

    def _ids(self, batch: _Batch) -> torch.Tensor:
        return self.ids[batch.start : batch.stop].to(self.chain.device)

    def _advance(self, sequences: int) -> None:
        self.done += sequences
        self.progress(sequences)
