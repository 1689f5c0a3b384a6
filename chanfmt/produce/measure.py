"""One pass over the calibration tokens: forward, activation-only backward, sums."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from chanfmt import schema
from chanfmt.errors import ChanfmtError, ModelError
from chanfmt.models.load import check_finite
from chanfmt.produce.capture import Capture
from chanfmt.produce.checkpoint import PassState
from chanfmt.produce.loss import Loss, NextTokenLoss
from chanfmt.produce.statistics import FFNStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chanfmt.models.ffn import FFN
    from chanfmt.produce.tokens import CalibrationTokens

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens in a batch that is not asked for otherwise: enough to fill the device, no more."""


@dataclass
class Measurement:
    """What a pass yields; between two batches, what it has so far.

    Attributes:
        statistics: One per FFN, in order.
        terms: Terms of the loss in a sequence.
        batch_size: Sequences in a batch.
        sequences: Sequences measured.
        loss: Their summed loss, nats.
    """

    statistics: list[FFNStatistics]
    terms: int
    batch_size: int
    sequences: int = 0
    loss: float = 0.0

    fresh = True
    """Whether something was measured since the last checkpoint."""

    @property
    def mean_loss(self) -> float:
        """Loss per term, nats."""
        return self.loss / max(1, self.sequences * self.terms)

    @property
    def nbytes(self) -> int:
        """About how many bytes `state` holds."""
        return sum(item.nbytes for item in self.statistics)

    def state(self) -> PassState:
        """What `measure` needs to start from here; on a CPU valid until the next batch only."""
        return PassState(self.sequences, self.batch_size, self.loss, [item.state() for item in self.statistics])


def measure(
    model: Any,
    ffns: list[FFN],
    tokens: CalibrationTokens,
    *,
    rho: float,
    loss: Loss | None = None,
    batch_size: int | None = None,
    progress: Callable[[int], object] = lambda tokens: None,
    start: PassState | None = None,
    after_batch: Callable[[Measurement], object] = lambda measurement: None,
) -> Measurement:
    """Accumulate the statistics of ``ffns`` over ``tokens``.

    The first split fixes the candidate core; redundancy is accumulated over the others.

    Args:
        model: A loaded model with frozen parameters.
        rho: Share of channels that will be supernodes.
        loss: What is differentiated; the sum of next-token NLL unless given.
        batch_size: Sequences in a batch; None picks one and halves it when memory runs out.
        progress: Called with the number of tokens of every finished batch; negative when it starts over.
        start: Where an earlier pass over the same tokens stood; its batch size is kept.
        after_batch: Called after every batch, while the sums are consistent.

    Raises:
        ModelError: The loss or a gradient is not finite.
        ChanfmtError: Memory runs out even so.
    """
    device = next(model.parameters()).device
    ids = torch.from_numpy(tokens.ids).long()
    split_of = torch.from_numpy(tokens.split_of).long()
    loss = loss or NextTokenLoss(model, ids[:1].to(device))
    size = batch_size or max(1, BATCH_TOKENS.get(device.type, 4096) // ids.shape[1])
    if start is not None:
        size = start.batch_size
    # How much memory a batch takes is not known beforehand: where one does not fit, start over with half.
    while True:
        statistics = [FFNStatistics(ffn, model.get_parameter(ffn.write).device) for ffn in ffns]
        measurement = Measurement(statistics, loss.terms(ids.shape[1]), size)
        if start is not None:
            for item, state in zip(statistics, start.ffns, strict=True):
                item.restore(state)
            measurement.sequences, measurement.loss = start.sequences, start.loss
            progress(start.sequences * ids.shape[1])
        capture = Capture(model, ffns, statistics)
        try:
            with capture.running():
                for nats, sequences in _batches(capture, loss, ffns, ids, split_of, size, rho, measurement.sequences):
                    measurement.loss += nats
                    measurement.sequences += sequences
                    progress(sequences * ids.shape[1])
                    after_batch(measurement)
            return measurement
        except torch.OutOfMemoryError:
            if batch_size is not None or size == 1:
                raise ChanfmtError(
                    f"out of memory with {size} sequences in a batch",
                    hint="use a smaller --batch-size or --seq-len, --dtype bfloat16, or --device cpu",
                ) from None
        if device.type == "cuda":
            torch.cuda.empty_cache()
        progress(-measurement.sequences * ids.shape[1])
        size //= 2
        start = None


def _batches(
    capture: Capture, loss: Loss, ffns: list[FFN], ids: torch.Tensor, split_of: torch.Tensor, size: int, rho: float, done: int
) -> Iterator[tuple[float, int]]:
    """Measure batch by batch from sequence ``done`` on; yields each one's summed loss in nats and its sequences.

    The tokens of a batch belong to one split: an expert's tokens come without word of their sequence.
    """
    device = next(loss.model.parameters()).device
    ends = torch.bincount(split_of, minlength=schema.SPLITS).cumsum(0).tolist()
    for split, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        if split == 1:
            for statistics in capture.statistics:
                for member in statistics.members:
                    if member.core is None:
                        member.choose_core(rho)
        for start in range(max(first, done), last, size):
            stop = min(start + size, last)
            capture.begin(stop - start, split)
            nats = loss.backward(ids[start:stop].to(device))
            if not math.isfinite(nats):
                check_finite(loss.model)
                raise ModelError(
                    f"the loss of sequences {start} to {stop - 1} is not finite; an activation overflowed",
                    hint="use --dtype float32",
                )
            overflowed = next((ffn for ffn, found in zip(ffns, capture.statistics, strict=True) if not found.is_finite()), None)
            if overflowed is not None:
                raise ModelError(
                    f"a gradient of sequences {start} to {stop - 1} overflowed in layer {overflowed.layer_index} "
                    f"({overflowed.container})",
                    hint="use --dtype float32",
                )
            yield nats, stop - start
