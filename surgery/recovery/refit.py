"""Refit what survived a cut: write projections by least squares, block by block, without a gradient or a label.

Two streams of hidden states go through the model side by side: the dense model's, and that of the model
cut and refitted so far. In every block the write projection of what was kept is fitted so that the block
gives, on what reaches it in the cut model, what it gives in the dense one: it makes up for the channels
that went and for what went wrong in the blocks before. Where a block does more with what its FFN writes than
adding it (a norm follows), the fit aims at what the FFN writes in the dense model instead. Every token
counts by the inverse of its squared norm: a normalisation follows, and a few tokens are a thousand times as
large as the others.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from chanfmt.errors import ModelError
from chanfmt.models.intercept import Interceptor
from chanfmt.models.resolve import ResolvedModel
from chanfmt.models.run import eager_experts, run_text
from chanfmt.models.streamed import StreamedModel, open_streamed
from chanfmt.produce.measure import usual_batch
from chanfmt.produce.spool import Spool
from surgery.checkpoint.patch import as_stored
from surgery.matching import match_ffns
from surgery.recovery.least_squares import Moments, fit
from surgery.recovery.options import LayerRecovery, Refit
from surgery.recovery.survivors import Survivors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from chanfmt.models.chain import Call
    from chanfmt.models.checkpoint import CheckpointIndex
    from chanfmt.models.ffn import FFN
    from surgery.plan import BlockPlan, PruningPlan

DAMPING = 3e-2
"""Penalty on leaving the weights that are there, as a share of the mean squared activation."""
CHECK_TOKENS = 128
_FEW = 32
"""Tokens on which a block's code is tried out."""
_SMALL = 1e-4
"""Share of the median squared norm below which tokens count no more for being smaller."""


@dataclass(frozen=True, eq=False)
class Refitted:
    """The fitted model.

    Attributes:
        layers: What was done, in model order.
        logits: What it makes of the first tokens of the first sequence, (token, vocabulary).
        ids: Those tokens.
        weight: Name of an FFN of the plan to its fitted write projection (outputs, kept), in the checkpoint's dtype.
    """

    layers: tuple[LayerRecovery, ...]
    logits: torch.Tensor
    ids: torch.Tensor
    weight: Callable[[str], torch.Tensor]


@contextlib.contextmanager
def refitted(
    plan: PruningPlan,
    index: CheckpointIndex,
    options: Refit,
    *,
    spool_directory: Path,
    begin: Callable[[int], object] = lambda total: None,
    progress: Callable[[int], object] = lambda sequences: None,
) -> Iterator[Refitted]:
    """Fit the write projections of ``plan``'s cut of the dense model whose checkpoint is ``index``; they are kept in the context.

    Args:
        options: On what, and where.
        spool_directory: Where hidden states and fitted weights lie beyond what is kept in memory.
        begin: Called once with the total of what ``progress`` is called with.
        progress: Called with the number of sequences that passed through a block.

    Raises:
        ModelError: The model cannot be run block by block, or its FFNs are of a kind that cannot be fitted.
        ChanfmtError: Memory or the spool's disk runs out.
    """
    resolved = ResolvedModel(index.directory, plan.model.id, "", "local")
    streamed = open_streamed(resolved, index, device=options.device)
    tokens = torch.from_numpy(options.tokens.astype("int64"))
    begin(2 * len(streamed.chain) * len(tokens))
    with Spool(options.spool_bytes, spool_directory) as spool:
        with torch.no_grad(), eager_experts(streamed.chain.model):
            result = _Pass(plan, index, streamed, spool, tokens, progress).result()
        yield result


class _Pass:
    """The spool holds, of batch b, the hidden states under ("dense", b) and ("cut", b), what the dense model's FFN writes
    under ("written", b), and activations under ("u", b); and the fitted weights under ("weight", name).
    """

    def __init__(
        self, plan: PruningPlan, index: CheckpointIndex, streamed: StreamedModel, spool: Spool, tokens: torch.Tensor,
        progress: Callable[[int], object],
    ) -> None:
        self.chain = streamed.chain
        self.index = index
        self.spool = spool
        self.progress = progress
        self.batches = tokens.split(usual_batch(self.chain.device, tokens.shape[1]))
        self.ids = tokens[:1, :CHECK_TOKENS]
        self.few = tokens[:1, :_FEW]
        self.blocks = _cut_of_each_block(plan, streamed)

    def result(self) -> Refitted:
        calls = []
        for place, ids in enumerate(self.batches):
            hidden, own = self.chain.calls(partial(run_text, self.chain.model, ids.to(self.chain.device)))
            self.spool.put(("dense", place), hidden)
            self.spool.put(("cut", place), hidden)
            calls.append(own)
        _, tries = self.chain.calls(partial(run_text, self.chain.model, self.few.to(self.chain.device)))
        layers = []
        for number in range(len(self.chain)):
            of_block = [own[number] for own in calls]
            with self.chain.loaded(number):
                if number in self.blocks:
                    layers.append(self._fit(number, *self.blocks[number], of_block, tries[number]))
                else:
                    self._pass(number, "dense", of_block)
                    self._pass(number, "cut", of_block)
        with self.chain.ending(self._get("cut", 0)[:1]):
            logits = run_text(self.chain.model, self.batches[0][:1].to(self.chain.device))[0]
        for place in range(len(self.batches)):
            self.spool.drop(("dense", place))
            self.spool.drop(("cut", place))
        return Refitted(tuple(layers), logits[0, : self.ids.shape[1]].float().cpu(), self.ids,
                        lambda name: self.spool.get(("weight", name)))

    def _pass(self, number: int, stream: str, calls: list[Call]) -> None:
        for place, ids in enumerate(self.batches):
            self.spool.put((stream, place), self.chain.run(number, calls[place], self._get(stream, place)))
            self.progress(len(ids))

    def _fit(self, number: int, block: BlockPlan, ffn: FFN, calls: list[Call], trial: Call) -> LayerRecovery:
        few = self._get("cut", 0)[:1, : self.few.shape[1]]
        survivors = Survivors(self.chain, number, ffn, torch.from_numpy(block.kept).long().to(self.chain.device))
        adds = survivors.adds(trial, few)
        if adds:
            self._pass(number, "dense", calls)
        else:
            self._pass_written(number, ffn, calls)
        survivors.narrow(trial, few)
        moments = Moments(survivors.weight.shape[1], ffn.outputs, self.chain.device)
        for place, ids in enumerate(self.batches):
            activations, without = survivors.run(calls[place], self._get("cut", place))
            if adds:
                wanted = self._get("dense", place).reshape(-1, ffn.outputs).float()
                moments.add(activations, wanted - without.reshape(wanted.shape).float(), _inverse_square(wanted))
                self.spool.put(("cut", place), without)
                self.spool.put(("u", place), activations)
            else:
                wanted = self._get("written", place)
                moments.add(activations, wanted, _inverse_square(wanted))
            self.progress(len(ids))
        fitted = fit(moments, survivors.weight, DAMPING)
        self._finish(block, survivors, fitted.weight, calls, adds)
        condition = fitted.condition if math.isfinite(fitted.condition) else None
        return LayerRecovery(block.layer_index, block.module, fitted.before, fitted.after, condition, fitted.damping)

    def _finish(self, block: BlockPlan, survivors: Survivors, weight: torch.Tensor, calls: list[Call], adds: bool) -> None:
        """Keep the fitted ``weight``, and have the cut model's hidden states pass it."""
        item = next(item for item in block.tensors if item.role == "write")
        stored = as_stored(weight, self.index.tensors[item.tensor].dtype)
        self.spool.put(("weight", block.name), stored)
        rounded = stored.to(self.chain.device, torch.float32)
        for place in range(len(self.batches)):
            before = self._get("cut", place)
            if adds:
                after = before + (self._get("u", place) @ rounded.T).to(before.dtype).reshape(before.shape)
            else:
                _, after = survivors.run(calls[place], before, rounded)
            self.spool.put(("cut", place), after)
            self.spool.drop(("u", place))
            self.spool.drop(("written", place))

    def _pass_written(self, number: int, ffn: FFN, calls: list[Call]) -> None:
        """`_pass` of the dense model, keeping what its FFN writes."""
        written: list[torch.Tensor] = []
        interceptor = Interceptor(self.chain.model)
        interceptor.on(ffn.members[0].write.matrix, after=written.append)
        with interceptor:
            for place, ids in enumerate(self.batches):
                self.spool.put(("dense", place), self.chain.run(number, calls[place], self._get("dense", place)))
                self.spool.put(("written", place), written.pop().reshape(-1, ffn.outputs).float())
                self.progress(len(ids))

    def _get(self, stream: str, place: int) -> torch.Tensor:
        return self.spool.get((stream, place)).to(self.chain.device)


def _inverse_square(vectors: torch.Tensor) -> torch.Tensor:
    """1 / mean square of each of ``vectors`` (token, feature); 0 for one that is 0."""
    power = vectors.square().mean(1)
    return torch.where(power > 0, 1 / power.clamp_min(_SMALL * power.median()), 0.0)


def _cut_of_each_block(plan: PruningPlan, streamed: StreamedModel) -> Mapping[int, tuple[BlockPlan, FFN]]:
    """Number of a block in the chain to the FFN in it that is cut."""
    found: dict[int, tuple[BlockPlan, FFN]] = {}
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
