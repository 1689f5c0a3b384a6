"""Refit what survived a cut: write projections by least squares, block by block, without a gradient or a label.

Two streams of hidden states go through the model side by side: the dense model's, and that of the model
cut and refitted so far. In every block the write projection of what was kept is fitted so that the block
gives, on what reaches it in the cut model, what it gives in the dense one: it makes up for the channels
that went and for what went wrong in the blocks before. Every token counts by the inverse of its squared
norm: a normalisation follows, and a few tokens are a thousand times as large as the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from chanfmt.errors import ModelError
from chanfmt.models.intercept import Interceptor
from chanfmt.models.resolve import ResolvedModel
from chanfmt.models.run import eager_experts, run_text
from chanfmt.models.streamed import StreamedModel, open_streamed
from chanfmt.models.weights import matrix_of
from chanfmt.produce.measure import usual_batch
from chanfmt.produce.spool import Spool
from surgery.least_squares import Moments, fit
from surgery.matching import match_ffns
from surgery.plan import BlockPlan
from surgery.recovery import LayerRecovery, Recovery

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chanfmt.models.chain import Call
    from chanfmt.models.checkpoint import CheckpointIndex
    from chanfmt.models.ffn import FFN
    from surgery.plan import PruningPlan

Keep = Callable[[BlockPlan, torch.Tensor], torch.Tensor]

DAMPING = 1e-2
"""Penalty on leaving the weights that are there, as a share of the mean squared activation."""
CHECK_TOKENS = 128
_ADDITIVE = 1e-3


@dataclass(frozen=True, eq=False)
class Recovered:
    """The fitted model.

    Attributes:
        layers: What was done, in model order.
        logits: What it makes of the first tokens of the first sequence, (token, vocabulary).
        ids: Those tokens.
    """

    layers: tuple[LayerRecovery, ...]
    logits: torch.Tensor
    ids: torch.Tensor


def recover(
    plan: PruningPlan,
    index: CheckpointIndex,
    recovery: Recovery,
    keep: Keep,
    *,
    spool_directory: Path,
    begin: Callable[[int], object] = lambda total: None,
    progress: Callable[[int], object] = lambda sequences: None,
) -> Recovered:
    """Fit the write projections of ``plan``'s cut of the dense model whose checkpoint is ``index``.

    Args:
        keep: Given an FFN and its fitted write projection (outputs, kept), stores it and returns it as it was rounded.
        spool_directory: Where hidden states lie beyond what is kept in memory.
        begin: Called once with the total of what ``progress`` is called with.
        progress: Called with the number of sequences that passed through a block.

    Raises:
        ModelError: The model cannot be run block by block, or its FFNs are of a kind that cannot be fitted.
        ChanfmtError: Memory or the spool's disk runs out.
    """
    resolved = ResolvedModel(index.directory, plan.model.id, "", "local")
    streamed = open_streamed(resolved, index, device=recovery.device)
    tokens = torch.from_numpy(recovery.tokens.astype("int64"))
    begin(2 * len(streamed.chain) * len(tokens))
    with Spool(recovery.spool_bytes, spool_directory) as spool, torch.no_grad(), eager_experts(streamed.chain.model):
        return _Recovery(plan, streamed, spool, tokens, keep, progress).result()


class _Recovery:
    """The spool holds under ("dense", b) and ("cut", b) the hidden states of batch b, under ("u", b) activations."""

    def __init__(
        self, plan: PruningPlan, streamed: StreamedModel, spool: Spool, tokens: torch.Tensor,
        keep: Keep, progress: Callable[[int], object],
    ) -> None:
        self.chain = streamed.chain
        self.spool = spool
        self.keep = keep
        self.progress = progress
        self.batches = tokens.split(usual_batch(self.chain.device, tokens.shape[1]))
        self.ids = tokens[:1, :CHECK_TOKENS]
        self.blocks = _cut_of_each_block(plan, streamed)

    def result(self) -> Recovered:
        calls = []
        for place, ids in enumerate(self.batches):
            hidden, own = self.chain.calls(partial(run_text, self.chain.model, ids.to(self.chain.device)))
            self.spool.put(("dense", place), hidden)
            self.spool.put(("cut", place), hidden)
            calls.append(own)
        layers = []
        for number in range(len(self.chain)):
            with self.chain.loaded(number):
                if number in self.blocks:
                    layers.append(self._fit(number, *self.blocks[number], calls))
                else:
                    self._pass(number, calls)
        with self.chain.ending(self._get("cut", 0)[:1]):
            logits = run_text(self.chain.model, self.batches[0][:1].to(self.chain.device))[0]
        return Recovered(tuple(layers), logits[0, : self.ids.shape[1]].float().cpu(), self.ids)

    def _pass(self, number: int, calls: list[list[Call]]) -> None:
        for place, ids in enumerate(self.batches):
            for stream in ("dense", "cut"):
                self.spool.put((stream, place), self.chain.run(number, calls[place][number], self._get(stream, place)))
                self.progress(len(ids))

    def _fit(self, number: int, block: BlockPlan, ffn: FFN, calls: list[list[Call]]) -> LayerRecovery:
        matrix = ffn.members[0].write.matrix
        device = self.chain.device
        kept = torch.from_numpy(block.kept).long().to(device)
        weight = matrix_of(self.chain.model, matrix)[:, kept].float()
        moments = Moments(len(kept), matrix.outputs, device)
        seen: list[torch.Tensor] = []

        def silence(inputs: torch.Tensor) -> torch.Tensor:
            seen.append(inputs)
            return torch.zeros_like(inputs)

        interceptor = Interceptor(self.chain.model)
        interceptor.on(matrix, before=silence)
        for place, ids in enumerate(self.batches):
            call = calls[place][number]
            wanted = self.chain.run(number, call, self._get("dense", place))
            self.progress(len(ids))
            before = self._get("cut", place)
            with interceptor:
                without = self.chain.run(number, call, before.clone())
            if len(seen) != 1:
                raise ModelError(f"{block.module} runs {len(seen)} times in its block, and --recover fits FFNs that run once")
            activations = seen.pop().reshape(-1, matrix.inputs)[:, kept].float()
            if place == 0:
                self._check_additive(number, call, before, without, activations @ weight.T, block, ffn, kept)
            flat = wanted.reshape(-1, matrix.outputs).float()
            moments.add(activations, flat - without.reshape(flat.shape).float(), 1 / flat.square().mean(1).clamp_min(1e-30))
            self.spool.put(("dense", place), wanted)
            self.spool.put(("cut", place), without)
            self.spool.put(("u", place), activations)
            self.progress(len(ids))
        fitted = fit(moments, weight, DAMPING)
        rounded = self.keep(block, fitted.weight).to(device, torch.float32)
        for place in range(len(self.batches)):
            without = self._get("cut", place)
            update = (self._get("u", place) @ rounded.T).to(without.dtype).reshape(without.shape)
            self.spool.put(("cut", place), without + update)
            self.spool.drop(("u", place))
        condition = fitted.condition if math.isfinite(fitted.condition) else None
        return LayerRecovery(block.layer_index, block.module, fitted.before, fitted.after, condition, fitted.damping)

    def _check_additive(
        self, number: int, call: Call, before: torch.Tensor, without: torch.Tensor, update: torch.Tensor, block: BlockPlan,
        ffn: FFN, kept: torch.Tensor,
    ) -> None:
        """Refuse a block that does more with what its FFN writes than adding it to its output."""
        mask = torch.zeros(ffn.width, device=kept.device)
        mask[kept] = 1
        interceptor = Interceptor(self.chain.model)
        interceptor.on(ffn.members[0].write.matrix, before=lambda inputs: inputs * mask.to(inputs.dtype))
        with interceptor:
            actual = self.chain.run(number, call, before.clone())
        difference = (actual - without).reshape(update.shape).float() - update
        tolerance = _ADDITIVE if actual.dtype in (torch.float32, torch.float64) else 5e-2
        if float(difference.abs().max()) > tolerance * max(float(actual.abs().max()), 1e-30):
            raise ModelError(f"the block of {block.module} does not just add what its FFN writes (a norm follows), and "
                             "--recover fits those that do", hint="cut without --recover")

    def _get(self, stream: str, place: int) -> torch.Tensor:
        return self.spool.get((stream, place)).to(self.chain.device)


def _cut_of_each_block(plan: PruningPlan, streamed: StreamedModel) -> Mapping[int, tuple[BlockPlan, FFN]]:
    """Number of a block in the chain to the FFN in it that is cut."""
    found: dict[int, tuple[BlockPlan, Any]] = {}
    for block, ffn in zip(plan.blocks, match_ffns(plan.blocks, streamed.ffns), strict=True):
        if not block.is_cut:
            continue
        number = streamed.chain.number_of(block.module)
        if ffn is None or ffn.experts or number is None:
            raise ModelError(f"{block.module} is not among the FFNs of the model's list of blocks")
        if number in found:
            raise ModelError(f"{block.module} and {found[number][0].module} are in one block, and --recover fits one FFN in each")
        found[number] = (block, ffn)
    return found
