"""Measure how many bytes a pass takes per token: run a few short sequences, and count the tensors that are alive.

The sums that these sequences add to are thrown away.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from chanfmt.building.capture import Capture
from chanfmt.building.predicted_memory import Growth, Stage, fitted
from chanfmt.building.statistics import FFNStatistics
from chanfmt.data.tokens import CalibrationTokens
from chanfmt.models.live_bytes import LiveBytes
from chanfmt.models.next_token import NextTokenLoss
from chanfmt.models.run import eager_experts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from chanfmt.building.column_sums import Wanted
    from chanfmt.building.columns import ColumnPlan
    from chanfmt.building.loss import Loss
    from chanfmt.data.arrays import CalibrationInputs
    from chanfmt.models.ffn import FFN
    from chanfmt.models.streaming.streamed import StreamedModel

_PARTS = (16, 8, 4)
"""Sequences are run at these parts of their length."""
_SHORTEST = 8
_HEAD_ROWS = 16
"""Rows of logits that the bytes of one row are measured on."""


def statistics_bytes(ffn: FFN, rho: float, seq_len: int, wanted: Wanted | None = None) -> int:
    """Bytes of the statistics of ``ffn`` at the end of a pass. They are counted on tensors without values."""
    statistics = FFNStatistics(ffn, torch.device("meta"), wanted)
    last = 0
    for member in statistics.members:
        count = member.candidate_count(rho)
        member.set_core(torch.empty(count, dtype=torch.int64, device="meta"))
        last += 0 if member.routed else count * 4 * (seq_len + 4)
    return statistics.nbytes + last


def probe_in_memory(
    model: Any,
    ffns: list[FFN],
    tokens: CalibrationTokens | CalibrationInputs,
    *,
    rho: float,
    loss: Loss,
    columns: ColumnPlan | None = None,
) -> dict[str, list[Stage]]:
    """The stages of a pass with the whole graph in memory, on each device, from a few short sequences of ``tokens``.

    Args: As for `chanfmt.building.measure.measure`.

    Raises:
        ModelError, torch.OutOfMemoryError: The model cannot run them.
    """
    wanted = None if columns is None else columns.wanted
    statistics: dict[str, int] = {}
    for ffn in ffns:
        device = str(model.get_parameter(ffn.write).device)
        statistics[device] = statistics.get(device, 0) + statistics_bytes(ffn, rho, tokens.seq_len, wanted)
    seen = _Seen()
    for length, batch in _batches(loss, tokens):
        capture = Capture(model, ffns, _shared(model, ffns, rho, wanted))
        with capture.running(), _unnoticed():
            capture.begin(1, 1, None if columns is None else columns.batch(0, 1, capture.device))
            seen.add(length, *_run(loss, batch))
    seen.head, seen.rows = _head(loss, tokens)
    return seen.stages(statistics)


def probe_streamed(
    streamed: StreamedModel,
    tokens: CalibrationTokens,
    *,
    rho: float,
    loss: Loss,
    columns: ColumnPlan | None = None,
    spool_limit: int = 0,
) -> dict[str, list[Stage]]:
    """The stages of a pass block by block, on each device, from a few short sequences of ``tokens``.

    One block of each shape is run by itself, and then what comes behind the last block.

    Args:
        spool_limit: Bytes that the spool keeps in memory.

    Raises:
        ModelError, torch.OutOfMemoryError: The model cannot run them.
    """
    chain = streamed.chain
    wanted = None if columns is None else columns.wanted
    batches = list(_batches(loss, tokens))
    with eager_experts(chain.model), _unnoticed():
        runs = [(length, batch, *chain.calls(partial(loss.backward, batch))) for length, batch in batches]
        hidden = runs[-1][2]
        # A tensor's device has a number, which the name that the user gave may lack.
        device = str(hidden.device)
        row = hidden.nbytes // max(1, hidden.shape[0] * hidden.shape[1])
        inputs = row * tokens.seq_len * len(tokens) * (len(chain) + 1)
        spool = {device: min(inputs, spool_limit)} if chain.device.type == "cpu" else {}
        stages = []
        for number, ffns in _distinct_blocks(streamed):
            seen = _Seen()
            with chain.loaded(number) as block:
                weights = 0 if chain.resident else sum(parameter.nbytes for parameter in block.parameters())
                for length, _, state, calls in runs:
                    found = _shared(chain.model, ffns, rho, wanted)
                    capture = Capture(chain.model, ffns, found)
                    with capture.running():
                        capture.begin(1, 1, None if columns is None else columns.batch(0, 1, chain.device))
                        seen.add(length, *_run_block(partial(chain.run, number, calls[number]), state))
            sums = sum(statistics_bytes(ffn, rho, tokens.seq_len, wanted) for ffn in ffns)
            stages += seen.stages({device: sums}, weights={device: weights}, spool=spool)[device]
        seen = _Seen()
        for length, batch, state, _ in runs:
            with chain.ending(state.detach().clone().requires_grad_(True)):
                seen.add(length, *_run(loss, batch))
        seen.head, seen.rows = _head(loss, tokens)
        stages += seen.stages({device: 0}, spool=spool)[device]
    return {device: stages}


@dataclass
class _Seen:
    """What was counted at a few lengths, in bytes by device.

    Attributes:
        head: Bytes of one row of logits, by device.
        rows: Rows of logits held at a time.
    """

    lengths: list[int] = field(default_factory=list)
    kept: list[Mapping[str, int]] = field(default_factory=list)
    peak: list[Mapping[str, int]] = field(default_factory=list)
    head: Mapping[str, float] = field(default_factory=dict)
    rows: int = 0

    def add(self, length: int, kept: Mapping[str, int], peak: Mapping[str, int]) -> None:
        self.lengths.append(length)
        self.kept.append(kept)
        self.peak.append(peak)

    def stages(
        self,
        statistics: Mapping[str, int],
        *,
        weights: Mapping[str, int] | None = None,
        spool: Mapping[str, int] | None = None,
    ) -> dict[str, list[Stage]]:
        devices = sorted({*statistics, *(name for counted in self.peak for name in counted)} - {"meta"})
        return {device: [self._stage(device, statistics, weights or {}, spool or {})] for device in devices}

    def _stage(self, device: str, statistics: Mapping[str, int], weights: Mapping[str, int], spool: Mapping[str, int]) -> Stage:
        held = [counted.get(device, 0) for counted in self.kept]
        working = [counted.get(device, 0) - kept for counted, kept in zip(self.peak, held, strict=True)]
        kept = fitted(self.lengths, held)
        # A loss without chunks does not say what it kept, so that its peak is fitted as a whole.
        pairs = kept.per_pair > 0 or not any(held)
        return Stage(
            weights=weights.get(device, 0),
            statistics=statistics.get(device, 0),
            spool=spool.get(device, 0),
            kept=kept,
            working=fitted(self.lengths, working, pairs=pairs) if any(working) else Growth(),
            logit_row=self.head.get(device, 0.0),
            logit_rows=self.rows,
        )


def _batches(loss: Loss, tokens: CalibrationTokens | CalibrationInputs) -> Iterator[tuple[int, Any]]:
    """Batches of one sequence each, of growing length, or one whole sample; each with its length."""
    batch: Any = tokens.batch(0, 1, loss.model)
    if not isinstance(tokens, CalibrationTokens) or tokens.seq_len < _SHORTEST * _PARTS[0] // _PARTS[-1]:
        yield tokens.seq_len, batch
        return
    unit = max(_SHORTEST, tokens.seq_len // _PARTS[0])
    for part in _PARTS:
        length = unit * (_PARTS[0] // part)
        yield length, batch[:, :length]


def _run(loss: Loss, batch: Any) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Run ``batch`` forward and backward. Returns what is kept for the backward pass, if the loss says so, and the peak."""
    with LiveBytes() as counted:
        if isinstance(loss, NextTokenLoss) and loss.chunked:
            rows = loss.states(batch)
            kept = dict(counted.live)
            rows.backward(torch.zeros_like(rows))
            del rows
        else:
            kept = {}
            loss.backward(batch)
    return kept, dict(counted.peak)


def _run_block(run: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Run one block forward and backward, as the streamed pass does. Returns what is kept in between, and the peak."""
    with LiveBytes() as counted, torch.enable_grad():
        # The clone stands for the input that comes from the spool.
        state = hidden.detach().clone().requires_grad_(True)
        output = run(state.clone())
        kept = dict(counted.live)
        output.backward(torch.zeros_like(output))
        del output, state
    return kept, dict(counted.peak)


def _head(loss: Loss, tokens: CalibrationTokens | CalibrationInputs) -> tuple[dict[str, float], int]:
    """Bytes of one row of logits, by device, and the number of rows held at a time; nothing if the loss has no chunks."""
    if not (isinstance(loss, NextTokenLoss) and loss.chunked and isinstance(tokens, CalibrationTokens)):
        return {}, 0
    count = min(_HEAD_ROWS, loss.rows_at_once, tokens.seq_len)
    targets: torch.Tensor = tokens.batch(0, 1, loss.model)[0, :count]
    weight = loss.head.weight
    with LiveBytes() as counted:
        loss.through_head(torch.zeros(count, weight.shape[1], dtype=weight.dtype, device=weight.device), targets)
    return {device: nbytes / count for device, nbytes in counted.peak.items()}, loss.rows_at_once


def _distinct_blocks(streamed: StreamedModel) -> list[tuple[int, list[FFN]]]:
    """The first block of each shape that has FFNs, with these FFNs."""
    of_block: dict[int, list[FFN]] = {}
    for ffn in streamed.ffns:
        number = streamed.chain.number_of(ffn.container)
        assert number is not None
        of_block.setdefault(number, []).append(ffn)
    shapes: dict[tuple[Any, ...], int] = {}
    for number in of_block:
        block = streamed.chain.model.get_submodule(streamed.chain.names[number])
        shapes.setdefault(tuple((name, tuple(item.shape)) for name, item in block.named_parameters()), number)
    return [(number, of_block[number]) for number in shapes.values()]


def _shared(model: Any, ffns: Sequence[FFN], rho: float, wanted: Wanted | None) -> list[FFNStatistics]:
    """Statistics for ``ffns``, with a core. FFNs of one shape on one device share theirs, so that they take little memory."""
    made: dict[tuple[Any, ...], FFNStatistics] = {}
    found = []
    for ffn in ffns:
        device = model.get_parameter(ffn.write).device
        maps = tuple(matrix.inputs for matrix in ffn.other_maps)
        key = (ffn.width, len(ffn.members), ffn.read_inputs, bool(ffn.experts), ffn.uses > 1, ffn.place, device, maps)
        if key not in made:
            made[key] = FFNStatistics(ffn, device, wanted)
            for member in made[key].members:
                member.set_core(torch.arange(member.candidate_count(rho)))
        found.append(made[key])
    return found


@contextlib.contextmanager
def _unnoticed() -> Iterator[None]:
    """Leave torch's random numbers as they were, so that a pass has the same bits with and without a probe."""
    with torch.random.fork_rng(devices=[]):
        yield
