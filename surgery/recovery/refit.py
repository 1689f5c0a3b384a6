"""Refit write projections of the kept channels by least squares, block by block, without gradients or labels.

Two streams of hidden states pass through the model in parallel: that of the dense model, and that of the model that is cut and
refitted up to this block. In every block, the write projection of the kept channels is fitted such that the cut block, on the
stream of the cut model, gives the output of the dense block on the stream of the dense model. The fit thus compensates for the
removed channels and for the errors of earlier blocks. Some blocks do more with the FFN's output than add it (a norm follows).
There, the target is the FFN's output in the dense model. Every token is weighted by the inverse of its squared norm, because a
normalisation follows, and a few tokens are a thousand times as large as the others.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from chanfmt.base.errors import ModelError
from chanfmt.models.find.intercept import Interceptor
from chanfmt.models.run import eager_experts, run_text, usual_batch
from chanfmt.models.streaming.spool import Spool
from chanfmt.models.streaming.streamed import StreamedModel, open_streamed
from surgery.cut.checkpoint.patch import as_stored
from surgery.cut.checkpoint.rounding import stored_dtype
from surgery.cut.matching import match_ffns
from surgery.recovery.least_squares import Moments, fit
from surgery.recovery.options import LayerRecovery, Refit
from surgery.recovery.survivors import Survivors, Write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from chanfmt.models.ffn import FFN
    from chanfmt.models.safetensors import CheckpointIndex
    from chanfmt.models.source import ModelSource
    from chanfmt.models.streaming.chain import Call
    from surgery.planning.plan import BlockPlan, PruningPlan

DAMPING = 1e-1
"""Penalty on the distance from the kept weights, as a share of the mean squared activation."""
CHECK_TOKENS = 128
_FEW = 32
"""Tokens on which a block's code is tried out."""
_SMALL = 1e-4
"""Share of the median squared norm below which the weight of a token no longer grows."""


@dataclass(frozen=True, eq=False)
class Refitted:
    """The fitted model.

    Attributes:
        layers: What was done to each FFN, in model order.
        logits: The fitted model's logits for the first tokens of the first sequence, float32 (token, vocabulary).
        ids: These tokens, int64 (1, token).
        fitted: Name of an FFN of the plan to its fitted write projection.
    """

    layers: tuple[LayerRecovery, ...]
    logits: torch.Tensor
    ids: torch.Tensor
    fitted: Callable[[str], FittedWrite]


@dataclass(frozen=True, eq=False)
class FittedWrite:
    """A fitted write projection, in the dtypes of the checkpoint.

    Attributes:
        weight: (outputs, kept).
        bias: (outputs,); None if the projection has no bias.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None


@contextlib.contextmanager
def refitted(
    plan: PruningPlan,
    source: ModelSource,
    options: Refit,
    *,
    spool_directory: Path,
    begin: Callable[[int], object] = lambda total: None,
    progress: Callable[[int], object] = lambda sequences: None,
    dtype: str | None = None,
) -> Iterator[Refitted]:
    """Fit the write projections of ``plan``'s cut of the dense model ``source``. They exist as long as the context.

    Args:
        options: Tokens, device and memory of the fit.
        spool_directory: Directory for hidden states and fitted weights that exceed the memory limit.
        begin: Called once with the total of the numbers that ``progress`` will be called with.
        progress: Called with the number of sequences that just passed through a block.
        dtype: Dtype of the floating tensors of the result; None if they stay as they are stored.

    Raises:
        ModelError: The model cannot run block by block, or its FFNs are of a kind that cannot be fitted.
        ChanfmtError: Memory or disk space runs out.
    """
    streamed = open_streamed(source, device=options.device)
    tokens = torch.from_numpy(options.tokens.astype("int64"))
    begin(2 * len(streamed.chain) * len(tokens))
    with Spool(options.spool_bytes, spool_directory) as spool:
        with torch.no_grad(), eager_experts(streamed.chain.model):
            result = _Pass(plan, source.index, streamed, spool, tokens, progress, dtype).result()
        yield result


class _Pass:
    """One pass of both streams through the model.

    For batch b, the spool holds the hidden states under ("dense", b) and ("cut", b), the output of the dense model's FFN under
    ("written", b), and activations under ("u", b). It holds the fitted weights under ("weight", name) and ("bias", name).
    """

    def __init__(
        self,
        plan: PruningPlan,
        index: CheckpointIndex,
        streamed: StreamedModel,
        spool: Spool,
        tokens: torch.Tensor,
        progress: Callable[[int], object],
        dtype: str | None,
    ) -> None:
        self.chain = streamed.chain
        self.index = index
        self.dtype = dtype
        self.spool = spool
        self.progress = progress
        self.batches = tokens.split(usual_batch(self.chain.device, tokens.shape[1]))
        self.ids = tokens[:1, :CHECK_TOKENS]
        self.few = tokens[:1, :_FEW]
        self.blocks = _cut_of_each_block(plan, streamed)
        self.with_bias: set[str] = set()

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
        return Refitted(tuple(layers), logits[0, : self.ids.shape[1]].float().cpu(), self.ids, self._fitted)

    def _fitted(self, name: str) -> FittedWrite:
        return FittedWrite(self.spool.get(("weight", name)), self.spool.get(("bias", name)) if name in self.with_bias else None)

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
        inputs = _Inputs(survivors)
        moments = Moments(inputs.count, ffn.outputs, self.chain.device)
        for place, ids in enumerate(self.batches):
            activations, without = survivors.run(calls[place], self._get("cut", place))
            if adds:
                wanted = self._get("dense", place).reshape(-1, ffn.outputs).float()
                moments.add(inputs.of(activations), wanted - without.reshape(wanted.shape).float(), _inverse_square(wanted))
                self.spool.put(("cut", place), without)
                self.spool.put(("u", place), activations)
            else:
                # The old bias stays in place, and the fit finds what is added to it.
                wanted = self._get("written", place)
                wanted = wanted if survivors.bias is None else wanted - survivors.bias
                moments.add(inputs.of(activations), wanted, _inverse_square(wanted))
            self.progress(len(ids))
        fitted = fit(moments, inputs.prior, DAMPING)
        self._finish(block, survivors, *inputs.parts(fitted.weight), calls, adds)
        condition = fitted.condition if math.isfinite(fitted.condition) else None
        return LayerRecovery(block.layer_index, block.module, fitted.before, fitted.after, condition, fitted.damping)

    def _finish(
        self,
        block: BlockPlan,
        survivors: Survivors,
        weight: torch.Tensor,
        shift: torch.Tensor | None,
        calls: list[Call],
        adds: bool,
    ) -> None:
        """Keep the fitted weights, and pass the cut model's hidden states through them, rounded as the checkpoint stores them."""
        dtypes = {item.role: stored_dtype(self.index.tensors[item.tensor], self.dtype) for item in block.tensors}
        device = self.chain.device
        stored = as_stored(weight, dtypes["write"])
        self.spool.put(("weight", block.name), stored)
        if shift is not None and survivors.bias is not None:
            bias = as_stored(survivors.bias.cpu() + shift.cpu(), dtypes["write_bias"])
            self.spool.put(("bias", block.name), bias)
            self.with_bias.add(block.name)
            shift = bias.to(device, torch.float32) - survivors.bias
        write = Write(stored.to(device, torch.float32), shift)
        for place in range(len(self.batches)):
            before = self._get("cut", place)
            if adds:
                after = before + write.of(self._get("u", place)).to(before.dtype).reshape(before.shape)
            else:
                _, after = survivors.run(calls[place], before, write)
            self.spool.put(("cut", place), after)
            self.spool.drop(("u", place))
            self.spool.drop(("written", place))

    def _pass_written(self, number: int, ffn: FFN, calls: list[Call]) -> None:
        """`_pass` of the dense model that also keeps the FFN's output."""
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


class _Inputs:
    """The inputs of the fit: the channels' activations, and a constant of their size if the write projection has a bias.

    Attributes:
        count: Number of inputs.
        prior: The old map, (outputs, count).
    """

    def __init__(self, survivors: Survivors) -> None:
        self._biased = survivors.bias is not None
        self._constant = 0.0
        weight = survivors.weight
        self.prior = torch.cat([weight, weight.new_zeros(len(weight), 1)], 1) if self._biased else weight
        self.count = self.prior.shape[1]

    def of(self, activations: torch.Tensor) -> torch.Tensor:
        """The inputs for ``activations``, (token, count)."""
        if not self._biased:
            return activations
        # The constant has the size of the activations, so that the penalty on the bias is like that on the weights.
        self._constant = self._constant or float(activations.square().mean().sqrt())
        return torch.cat([activations, activations.new_full((len(activations), 1), self._constant)], 1)

    def parts(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The parts of a fitted map: write vectors (outputs, kept), and the change of the bias (outputs,)."""
        return (weight[:, :-1], weight[:, -1] * self._constant) if self._biased else (weight, None)


def _inverse_square(vectors: torch.Tensor) -> torch.Tensor:
    """1 / mean square of each of ``vectors`` (token, feature); 0 for a vector of zeros."""
    power = vectors.square().mean(1)
    return torch.where(power > 0, 1 / power.clamp_min(_SMALL * power.median()), 0.0)


def _cut_of_each_block(plan: PruningPlan, streamed: StreamedModel) -> Mapping[int, tuple[BlockPlan, FFN]]:
    """Number of a block in the chain to the FFN in that block that is cut."""
    found: dict[int, tuple[BlockPlan, FFN]] = {}
    for block, ffn in zip(plan.blocks, match_ffns(plan.blocks, streamed.ffns), strict=True):
        if not block.is_cut:
            continue
        number = streamed.chain.number_of(block.module)
        if ffn is None or ffn.experts or number is None:
            raise ModelError(f"{block.module} is not among the FFNs of the model's list of blocks")
        if number in found:
            raise ModelError(
                f"{block.module} and {found[number][0].module} are in one block, and --recover fits one FFN per block"
            )
        found[number] = (block, ffn)
    return found
