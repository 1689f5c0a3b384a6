"""One pass over the calibration tokens: forward, backward along the activations only, sums."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from chanfmt.base.errors import ChanfmtError, ModelError
from chanfmt.base.narrate import say
from chanfmt.building.capture import Capture
from chanfmt.building.state import PassState
from chanfmt.building.statistics import FFNStatistics, first_overflow
from chanfmt.data.tokens import CalibrationTokens
from chanfmt.format import schema
from chanfmt.models.distributed import Group
from chanfmt.models.load import check_finite
from chanfmt.models.next_token import NextTokenLoss
from chanfmt.models.out_of_memory import free_cached_memory, out_of_memory_recognised
from chanfmt.models.run import usual_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from chanfmt.building.columns import ColumnPlan
    from chanfmt.building.loss import Loss
    from chanfmt.data.arrays import CalibrationInputs
    from chanfmt.models.ffn import FFN


@dataclass
class Measurement:
    """The result of a pass; between two batches, its result so far.

    If several processes measure, each holds the sums of what it has measured itself since `collect`.

    Attributes:
        statistics: The statistics of each FFN, in model order.
        terms: Terms of the loss in a sequence.
        batch_size: Sequences in a batch of one process.
        sequences: Sequences measured, by all processes.
        loss: Summed loss of these sequences, nats.
    """

    statistics: Sequence[FFNStatistics]
    terms: int
    batch_size: int
    sequences: int = 0
    loss: float = 0.0

    fresh = True
    """Whether something was measured since the last partial atlas."""

    @property
    def mean_loss(self) -> float:
        """Loss per term, nats."""
        return self.loss / max(1, self.sequences * self.terms)

    @property
    def nbytes(self) -> int:
        """Approximate number of bytes in `state`."""
        return sum(item.nbytes for item in self.statistics)

    def collect(self, group: Group) -> None:
        """Move all sums to the first process. The others continue from zero. Raises `LostProcessError`."""
        if group.size == 1:
            return
        for item in self.statistics:
            item.collect(group)
        losses = group.exchange(self.loss)
        self.loss = 0.0 if group.rank else sum(losses)

    def keep_beside(self, partial: Path) -> None:
        """Write the files that belong beside the partial atlas ``partial``, before it is written."""

    def kept(self, partial: Path) -> None:
        """Take note that this measurement is in the partial atlas ``partial``."""

    def laid_aside(self, number: int, variables: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """``variables`` of FFN ``number``, kept in memory or in the spool, like the statistics, until they are written."""
        return variables

    def state(self) -> PassState:
        """The state that `measure` needs to start from here. On a CPU it is valid until the next batch only."""
        return PassState(self.sequences, self.batch_size, self.loss, [item.state() for item in self.statistics])


def measure(
    model: Any,
    ffns: list[FFN],
    tokens: CalibrationTokens | CalibrationInputs,
    *,
    rho: float,
    loss: Loss | None = None,
    batch_size: int | None = None,
    first_size: int | None = None,
    progress: Callable[[int], object] = lambda tokens: None,
    start: PassState | None = None,
    after_batch: Callable[[Measurement], object] = lambda measurement: None,
    group: Group | None = None,
    columns: ColumnPlan | None = None,
) -> Measurement:
    """Accumulate the statistics of ``ffns`` over ``tokens``.

    The first split fixes the candidate core; redundancy is accumulated over the other splits. Each of several processes
    takes a part of every batch. At the end the first process has the sums.

    Args:
        model: A loaded model with frozen parameters.
        ffns: The FFNs of ``model`` to measure, in model order.
        tokens: The sequences or samples to measure on.
        rho: Share of channels that will be supernodes.
        loss: The loss to differentiate; by default the sum of next-token NLL.
        batch_size: Sequences in a batch of one process; None begins with ``first_size``, and halves it when memory runs out.
        first_size: See `chanfmt.building.choose_batch.choose_batch`; None means the usual number.
        progress: Called with the number of tokens of every finished batch; with a negative number if the pass starts over.
        start: The state of an earlier pass over the same tokens, which is continued with the same batch size. Only the first
            process reads it.
        after_batch: Called after every batch, while the sums are consistent.
        group: The processes that measure together.
        columns: The columns to accumulate for besides.

    Raises:
        ModelError: The loss or a gradient is not finite.
        ChanfmtError: Memory runs out with the smallest batch, with the given one, or with that of ``start``.
        LostProcessError: Another process is gone.
    """
    group = group or Group()
    device = next(model.parameters()).device
    if loss is None:
        assert isinstance(tokens, CalibrationTokens)
        loss = NextTokenLoss(model, tokens.batch(0, 1, model))
    size = batch_size or first_size or usual_batch(device, tokens.rows)
    if start is not None:
        size = start.batch_size
    size, done = group.exchange((size, 0 if start is None else start.sequences))[0]
    resumed = done > 0
    # The memory of a batch is predicted. If one does not fit all the same, start over with half of it.
    while True:
        measured = 0
        try:
            measurement = group.together(partial(_begun, model, ffns, loss.terms(tokens.seq_len), size, done, start, columns))
            measured = done if start is not None else 0
            progress(measured * tokens.seq_len)
            capture = Capture(model, ffns, list(measurement.statistics))
            with out_of_memory_recognised(), capture.running():
                for sequences in _batches(measurement, capture, loss, ffns, tokens, rho, group, columns):
                    measurement.sequences += sequences
                    measured += sequences
                    progress(sequences * tokens.seq_len)
                    after_batch(measurement)
            measurement.collect(group)
            return measurement
        except torch.OutOfMemoryError:
            if batch_size is not None or resumed or size == 1:
                raise out_of_memory(
                    size, "--stream, --memory recompute, a smaller --batch-size or --seq-len", resumed=resumed
                ) from None
        say(f"note: out of memory with {size} sequences in a batch; starting over with {size // 2}")
        free_cached_memory(device)
        progress(-measured * tokens.seq_len)
        size //= 2


def _begun(
    model: Any, ffns: list[FFN], terms: int, size: int, done: int, start: PassState | None, columns: ColumnPlan | None
) -> Measurement:
    """A measurement from which a pass goes on: that of ``start``, or an empty one."""
    wanted = None if columns is None else columns.wanted
    statistics = [FFNStatistics(ffn, model.get_parameter(ffn.write).device, wanted) for ffn in ffns]
    measurement = Measurement(statistics, terms, size, done)
    if start is not None:
        for item, state in zip(measurement.statistics, start.ffns, strict=True):
            item.restore(state)
        measurement.loss = start.loss
    return measurement


def out_of_memory(size: int, levers: str, *, resumed: bool) -> ChanfmtError:
    """The error for a batch of ``size`` sequences that does not fit.

    A build that was continued keeps its batch size, because its result must equal that of an uninterrupted build. It is not
    started over either, because that would throw away what the partial atlas holds.

    Args:
        levers: Options that make a batch smaller, as the object of "use".
        resumed: Whether the pass continued a partial atlas.
    """
    if not resumed:
        return ChanfmtError(
            f"out of memory with {size} sequences in a batch", hint=f"use {levers}, --dtype bfloat16, or --device cpu"
        )
    smaller = f"--batch-size {size // 2}" if size > 1 else levers
    return ChanfmtError(
        f"out of memory with {size} sequences in a batch, and an unfinished build keeps its batch size",
        hint=f"free some memory, and continue with the same command; or start over without --resume, with {smaller}",
    )


def split_ranges(split_of: np.ndarray) -> list[tuple[int, int]]:
    """First sequence and end (excluded) of every split."""
    ends = np.bincount(split_of, minlength=schema.SPLITS).cumsum().tolist()
    return list(itertools.pairwise([0, *ends]))


def _batches(
    measurement: Measurement,
    capture: Capture,
    loss: Loss,
    ffns: list[FFN],
    tokens: CalibrationTokens | CalibrationInputs,
    rho: float,
    group: Group,
    columns: ColumnPlan | None,
) -> Iterator[int]:
    """Measure batch by batch from where ``measurement`` stands. Yields the number of sequences of each batch.

    All tokens of a batch belong to one split, because the tokens of an expert do not say which sequence they come from. A
    batch is divided among all processes, so the measured sequences are always the first ones, whatever the number of
    processes.
    """
    size, done = measurement.batch_size * group.size, measurement.sequences
    for split, (first, last) in enumerate(split_ranges(tokens.split_of)):
        if split == 1:
            # A build that continues behind this point has its cores in the first process, and nothing yet in the others.
            if done <= first:
                measurement.collect(group)
            _choose_cores(measurement, rho, group)
        for start in range(max(first, done), last, size):
            stop = min(start + size, last)
            part = group.share(start, stop)
            measurement.loss += group.together(partial(_batch, capture, loss, ffns, tokens, *part, split, columns))
            yield stop - start


def _batch(
    capture: Capture,
    loss: Loss,
    ffns: list[FFN],
    tokens: CalibrationTokens | CalibrationInputs,
    start: int,
    stop: int,
    split: int,
    columns: ColumnPlan | None,
) -> float:
    """Measure sequences ``start`` to ``stop``. Returns their summed loss in nats."""
    if start == stop:
        return 0.0
    capture.begin(stop - start, split, None if columns is None else columns.batch(start, stop, capture.device))
    nats = loss.backward(tokens.batch(start, stop, loss.model))
    if not math.isfinite(nats):
        check_finite(loss.model)
        raise ModelError(
            f"the loss of sequences {start} to {stop - 1} is not finite; an activation overflowed",
            hint="use --dtype float32",
        )
    check_no_overflow(ffns, capture.statistics, start, stop)
    return nats


def check_no_overflow(ffns: list[FFN], statistics: Sequence[FFNStatistics], start: int, stop: int) -> None:
    """Raise `ModelError` if sequences ``start`` to ``stop`` gave one of ``ffns`` a gradient that is not finite."""
    number = first_overflow(statistics)
    if number is not None:
        raise ModelError(
            f"a gradient of sequences {start} to {stop - 1} overflowed in layer {ffns[number].layer_index} "
            f"({ffns[number].container})",
            hint="use --dtype float32",
        )


def _choose_cores(measurement: Measurement, rho: float, group: Group) -> None:
    """Fix the candidate cores that are not fixed yet, from the sums of all processes, which the first one has."""
    members = [member for item in measurement.statistics for member in item.members]

    def choose() -> None:
        for member in members if group.rank == 0 else ():
            if member.core is None:
                member.choose_core(rho)

    def take_over() -> None:
        for member, chosen in zip(members, candidates, strict=True):
            if member.core is None and chosen is not None:
                member.set_core(chosen)

    # The cross moments with a core take most of the memory of a build. What goes wrong here ends all processes.
    group.together(choose)
    candidates = group.exchange([None if member.core is None else member.core.candidates.cpu() for member in members])[0]
    group.together(take_over)
