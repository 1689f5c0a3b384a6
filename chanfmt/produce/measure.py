"""One pass over the calibration tokens: forward, activation-only backward, sums."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from chanfmt.errors import ChanfmtError, ModelError
from chanfmt.models.discover import FFN, widths
from chanfmt.models.weights import check_finite
from chanfmt.produce.capture import Capture
from chanfmt.produce.loss import NextTokenLoss
from chanfmt.produce.statistics import ChannelStatistics

if TYPE_CHECKING:
    from collections.abc import Callable

    from chanfmt.produce.tokens import CalibrationTokens

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens in a batch that is not asked for otherwise: enough to fill the device, no more."""


@dataclass(frozen=True)
class Measurement:
    """What one pass yields.

    Attributes:
        statistics: One per FFN, in order.
        mean_loss: Next-token NLL per predicted token, nats.
    """

    statistics: list[ChannelStatistics]
    mean_loss: float


def measure(
    model: Any,
    ffns: list[FFN],
    tokens: CalibrationTokens,
    *,
    rho: float,
    batch_size: int | None = None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Measurement:
    """Accumulate the statistics of ``ffns`` over ``tokens``.

    The first split fixes the candidate core; redundancy is accumulated over the others.

    Args:
        model: A loaded causal LM with frozen parameters.
        rho: Share of channels that will be supernodes.
        batch_size: Sequences in a batch; None picks one and halves it when memory runs out.
        progress: Called with the number of tokens of every finished batch.

    Raises:
        ModelError: The loss is not finite.
        ChanfmtError: Memory runs out even so.
    """
    device = next(model.parameters()).device
    ids = torch.from_numpy(tokens.ids).long()
    split_of = torch.from_numpy(tokens.split_of).long()
    loss = NextTokenLoss(model, ids[:1].to(device))
    size = batch_size or max(1, BATCH_TOKENS.get(device.type, 4096) // ids.shape[1])
    # The smallest share of a batch's memory is not known beforehand; the first batch finds out.
    while True:
        statistics = [ChannelStatistics(ffn.width, widths(model.get_submodule(ffn.reads[0].module))[0], device)
                      for ffn in ffns]
        capture = Capture(model, ffns, statistics)
        try:
            with capture.running():
                total = _run(capture, loss, ids, split_of, size, rho, progress)
            break
        except _FirstBatchOutOfMemory:
            _free(device)
            if batch_size is not None or size == 1:
                raise _out_of_memory(size) from None
            size = size // 2
        except torch.OutOfMemoryError:
            raise _out_of_memory(size) from None
    predicted = ids.shape[0] * (ids.shape[1] - 1)
    return Measurement(statistics, total / max(1, predicted))


class _FirstBatchOutOfMemory(Exception):
    """Nothing has been added up yet, so a smaller batch may start over."""


def _run(
    capture: Capture, loss: NextTokenLoss, ids: torch.Tensor, split_of: torch.Tensor, size: int, rho: float,
    progress: Callable[[int], object],
) -> float:
    device = next(loss.model.parameters()).device
    warm_up = int((split_of == 0).sum())
    total = 0.0
    for part, (first, last) in enumerate(((0, warm_up), (warm_up, len(ids)))):
        if part == 1:
            for statistics in capture.statistics:
                statistics.choose_core(rho)
        for start in range(first, last, size):
            stop = min(start + size, last)
            capture.begin(split_of[start:stop])
            try:
                nats = loss.backward(ids[start:stop].to(device))
            except torch.OutOfMemoryError:
                if start == 0:
                    raise _FirstBatchOutOfMemory from None
                raise
            if not math.isfinite(nats):
                check_finite(loss.model)
                raise ModelError(
                    f"the loss of sequences {start} to {stop - 1} is not finite; an activation overflowed",
                    hint="use --dtype float32",
                )
            total += nats
            progress((stop - start) * ids.shape[1])
    return total


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _out_of_memory(size: int) -> ChanfmtError:
    return ChanfmtError(
        f"out of memory with {size} sequences in a batch",
        hint="use a smaller --batch-size or --seq-len, --dtype bfloat16, or --device cpu",
    )
