"""Refit the kept channels block by block, without labels: the write projections by least squares, or whole FFNs.

Two streams of hidden states pass through the model in parallel: that of the dense model, and that of the model that is cut and
refitted up to this block. In every block, the write projection of the kept channels is fitted such that the cut block, on the
stream of the cut model, gives the output of the dense block on the stream of the dense model. The fit thus compensates for the
removed channels and for the errors of earlier blocks. Some blocks do more with the FFN's output than add it (a norm follows).
There, the target of least squares is the FFN's output in the dense model. Every token is weighted by the inverse of its squared
norm, because a normalisation follows, and a few tokens are a thousand times as large as the others.

A part of the sequences is held out. It chooses the penalty of the least squares, and the epoch at which `surgery.recovery.adapt`
stops.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from chanfmt.base.errors import ModelError
from chanfmt.base.files import check_space
from chanfmt.base.narrate import say
from chanfmt.models.find.intercept import Interceptor
from chanfmt.models.run import eager_experts, run_text, usual_batch
from chanfmt.models.streaming.chain import Call
from chanfmt.models.streaming.parameters import freed_memory_reused
from chanfmt.models.streaming.spool import Spool
from chanfmt.models.streaming.streamed import StreamedModel, open_streamed
from surgery.cut.checkpoint.patch import as_stored
from surgery.cut.checkpoint.rounding import stored_dtype
from surgery.cut.matching import match_ffns
from surgery.recovery.adapt import EPOCHS, adapt, evaluate, total
from surgery.recovery.experts import JointFitting
from surgery.recovery.folds import fold_places, split_batches
from surgery.recovery.least_squares import Moments, choose_fit, fit
from surgery.recovery.options import Distillation, LayerRecovery, Refit
from surgery.recovery.precision import descent_dtype, exact_products, fast_products, full_products
from surgery.recovery.resume import RefitState
from surgery.recovery.survivors import Survivors
from surgery.recovery.targets import Alone, InBlock, check_finite_states, inverse_square
from surgery.recovery.writes import Write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from chanfmt.models.ffn import FFN
    from chanfmt.models.safetensors import CheckpointIndex
    from chanfmt.models.source import ModelSource
    from surgery.planning.plan import BlockPlan, PruningPlan
    from surgery.recovery.adapt import Target
    from surgery.recovery.workplace import Workplace

CHECK_TOKENS = 128
_CHECK = ("check", 0)
"""Key of the hidden states of the checked tokens."""


@dataclass(frozen=True, eq=False)
class Refitted:
    """The fitted model.

    Attributes:
        layers: What was done to each FFN, in model order.
        logits: The fitted model's logits for the first tokens of the first sequence, float32 (token, vocabulary).
        ids: These tokens, int64 (1, token).
        fitted: Name of an FFN of the plan to its fitted weights.
        distillation: What a distillation did after the refit; None without one.
    """

    layers: tuple[LayerRecovery, ...]
    logits: torch.Tensor
    ids: torch.Tensor
    fitted: Callable[[str], FittedFFN]
    distillation: Distillation | None = None


@dataclass(frozen=True, eq=False)
class FittedFFN:
    """The fitted weights of an FFN, in the dtypes of the checkpoint.

    Attributes:
        weight: The write projection, (outputs, kept).
        bias: Its bias, (outputs,); None if it has none.
        reads: Role to the rows of the kept channels, (kept, inputs), and role with ``_bias`` to their biases, (kept,). Empty if
            the read projections were not changed.

    Of routed experts, all have another axis in front, which runs over the experts.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    reads: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def expert(self, number: int) -> FittedFFN:
        """The weights of one expert."""
        reads = {role: values[number] for role, values in self.reads.items()}
        return FittedFFN(self.weight[number], None if self.bias is None else self.bias[number], reads)


@contextlib.contextmanager
def refitted(
    plan: PruningPlan,
    source: ModelSource,
    options: Refit,
    workplace: Workplace,
) -> Iterator[Refitted]:
    """Fit the kept channels of ``plan``'s cut of the dense model ``source``. The weights exist as long as the context.

    The model runs in float32, whatever the dtype of the checkpoint.

    Args:
        options: Method, tokens, device and memory of the fit.

    Raises:
        ModelError: The model cannot run block by block, or its FFNs are of a kind that cannot be fitted.
        ChanfmtError: Memory or disk space runs out.
    """
    # In 16 bits the streams would differ from what the file computes by more than the fit gains. The weights are rounded once.
    streamed = open_streamed(source, dtype="float32", device=options.device)
    with Spool(options.spool_bytes, workplace.directory) as spool:
        run = _Pass(plan, source.index, streamed, spool, options, workplace)
        with torch.no_grad(), eager_experts(streamed.chain.model), fast_products(streamed.chain.device):
            run.check_room(workplace.directory, workplace.reserved)
            result = run.result()
        yield result


class _Pass:
    """One pass of both streams through the model.

    For batch b, the spool holds the hidden states under ("dense", b) and ("cut", b), the output of the dense model's FFN under
    ("written", b), activations under ("u", b), and what the FFN's module reads under ("x", b). It holds the fitted weights
    under ("weight", name), ("bias", name) and (role, name).
    """

    def __init__(
        self,
        plan: PruningPlan,
        index: CheckpointIndex,
        streamed: StreamedModel,
        spool: Spool,
        options: Refit,
        workplace: Workplace,
    ) -> None:
        self.chain = streamed.chain
        self.index = index
        self.dtype = workplace.dtype
        self.spool = spool
        self.options = options
        self.begin = workplace.begin
        self.progress = workplace.progress
        self.partial_refit = workplace.partial_refit
        assert options.tokens is not None
        length = options.tokens.shape[1]
        self.batches = split_batches(options.tokens, options.source_of, usual_batch(self.chain.device, length))
        self.ids = self.batches[0].ids[:1, :CHECK_TOKENS]
        self.blocks = _cut_of_each_block(plan, streamed)
        self.roles: dict[str, tuple[str, ...]] = {}
        self.passes = range(min(self.blocks), max(self.blocks) + 1)

    def result(self) -> Refitted:
        calls = self._calls()
        check, checks = self.chain.calls(partial(run_text, self.chain.model, self.ids.to(self.chain.device)))
        self.spool.put(_CHECK, check)
        state = self._restored() or RefitState(0, (), {})
        self.roles = dict(state.roles)
        layers = list(state.layers)
        self.begin(self._sequences(state.block))
        for number in range(state.block, len(self.chain)):
            of_block = [own[number] for own in calls]
            if number == self.passes.start:
                # Up to here both models are the same.
                for place in range(len(self.batches)):
                    self.spool.put(("cut", place), self.spool.get(("dense", place)))
            check = self.spool.get(_CHECK).to(self.chain.device)
            with self.chain.loaded(number), freed_memory_reused():
                if number in self.blocks:
                    fitting = self._fitting(number, of_block, checks[number], check)
                    layers += fitting.done()
                    check = fitting.check
                else:
                    with full_products():
                        check = self.chain.run(number, checks[number], check)
                    for stream in self._streams(number):
                        self.pass_on(number, stream, of_block)
            self.spool.put(_CHECK, check)
            self._save(RefitState(number + 1, tuple(layers), self.roles))
        check = self.spool.get(_CHECK).to(self.chain.device)
        with self.chain.ending(check), full_products():
            logits = run_text(self.chain.model, self.ids.to(self.chain.device))[0]
        return Refitted(tuple(layers), logits[0].float().cpu(), self.ids, self._fitted)

    def check_room(self, directory: Path, reserved: int) -> None:
        """Check, before the work, that the disk of ``directory`` has room for what the spool and the saved state need.

        Raises:
            ChanfmtError: The spool needs more than there is.
        """
        state, _ = self.chain.calls(partial(run_text, self.chain.model, self.ids.to(self.chain.device)))
        width = state.shape[-1] * state.dtype.itemsize
        tokens = sum(batch.ids.numel() for batch in self.batches)
        cut = [each for of_block in self.blocks.values() for each in of_block]
        weights = 4 * sum(
            (block.channel_parameters or 3 * ffn.outputs) * block.n_kept * max(1, block.n_experts) for block, ffn in cut
        )
        # Besides the streams, the spool holds what one block keeps of every token.
        widest = 4 * max(max(block.n_kept, ffn.outputs) for block, ffn in cut)
        reserved += max(0, tokens * (2 * width + widest) + weights - self.options.spool_bytes)
        check_space(directory, reserved)
        if self.partial_refit is not None:
            self.partial_refit.begin(2 * tokens * width + state.nbytes, weights, reserved)

    def _calls(self) -> list[list[Call]]:
        """The calls of all blocks for each batch. The spool then holds the first hidden states."""
        calls: list[list[Call]] = []
        known: dict[torch.Size, list[Call]] = {}
        for place, batch in enumerate(self.batches):
            hidden, own = self.chain.calls(partial(run_text, self.chain.model, batch.ids.to(self.chain.device)))
            self.spool.put(("dense", place), hidden)
            # Masks of many batches would need more memory than a block. As a rule they are alike.
            other = known.setdefault(batch.ids.shape, own)
            calls.append(other if all(map(Call.same, own, other)) else own)
        return calls

    def _streams(self, number: int) -> tuple[str, ...]:
        """The streams that go into block ``number`` and differ."""
        if number >= self.passes.stop:
            return ()
        return ("dense",) if number < self.passes.start else ("dense", "cut")

    def _sequences(self, first: int) -> int:
        """Sequences that pass through a block, or through its FFN in an epoch, from block ``first`` on."""
        passing = sum(len(self._streams(number)) for number in range(first, self.passes.stop)) * sum(
            len(batch.ids) for batch in self.batches
        )
        epochs = EPOCHS * sum(len(batch.ids) for batch in self.batches if not batch.held_out)
        adapted = sum(number >= first for number in self.blocks) if self.options.method == "block" else 0
        return passing + epochs * adapted

    def _restored(self) -> RefitState | None:
        """The state that an interrupted refit left, with its tensors in the spool; None if there is none."""
        state = None if self.partial_refit is None else self.partial_refit.state
        if self.partial_refit is None or state is None:
            return None
        for place in range(len(self.batches)):
            self.spool.drop(("dense", place))
        self.partial_refit.restore(self.spool)
        done = f"{len(state.layers)} of {sum(map(len, self.blocks.values()))} FFNs are fitted"
        where = self.chain.names[state.block] if state.block < len(self.chain) else "the end"
        say(f"continuing the refit at {where}: {done}")
        return state

    def _save(self, state: RefitState) -> None:
        """Save ``state`` if it is time, and forget what later blocks do not need."""
        ended = state.block == self.passes.stop
        if ended:
            for place in range(len(self.batches)):
                self.spool.drop(("dense", place))
                self.spool.drop(("cut", place))
        if self.partial_refit is not None and state.block <= self.passes.stop:
            # Before the first cut, the streams are the same.
            streams = self._streams(state.block) if state.block > self.passes.start else ("dense",)
            hidden = [(stream, place) for stream in streams for place in range(len(self.batches))]
            self.partial_refit.save_if_due(state, self.spool, [_CHECK, *hidden], last=ended)

    def _fitting(self, number: int, calls: list[Call], trial: Call, check: torch.Tensor) -> _Fitting | JointFitting:
        cut = self.blocks[number]
        if len(cut) == 1 and cut[0][1].kind == "dense":
            return _Fitting(self, number, *cut[0], calls, trial, check)
        return JointFitting(self, number, cut, calls, trial, check)

    def _fitted(self, name: str) -> FittedFFN:
        values = {role: self.spool.get((role, name)) for role in self.roles[name]}
        return FittedFFN(values.pop("weight"), values.pop("bias", None), values)

    def pass_on(self, number: int, stream: str, calls: list[Call]) -> None:
        for place, batch in enumerate(self.batches):
            self.spool.put((stream, place), self.chain.run(number, calls[place], self.get(stream, place)))
            self.progress(len(batch.ids))

    def get(self, key: str, place: int) -> torch.Tensor:
        return self.spool.get((key, place)).to(self.chain.device)


class _Fitting:
    """The fit of one FFN, whose block is loaded.

    Attributes:
        check: Hidden states of the checked tokens behind the fitted block.
    """

    def __init__(
        self, run: _Pass, number: int, block: BlockPlan, ffn: FFN, calls: list[Call], trial: Call, check: torch.Tensor
    ) -> None:
        self.run = run
        self.number = number
        self.block = block
        self.ffn = ffn
        self.calls = calls
        self.trial = trial
        self.check = check
        self.device = run.chain.device
        self.survivors = Survivors(run.chain, number, ffn, block.kept)
        self.adds = self.survivors.adds(trial, check)
        self.adapts = run.options.method == "block"
        # Whether the FFN's module runs by itself, and whether the output of the FFN is kept apart from that of its block.
        self.alone = self.apart = False
        self.inputs = _Inputs(self.survivors)

    def done(self) -> list[LayerRecovery]:
        """Fit, keep the weights, and pass the hidden states of the cut model on."""
        run, batches = self.run, self.run.batches
        if self.adds:
            run.pass_on(self.number, "dense", self.calls)
        else:
            self._pass_written()
        self.survivors.narrow(self.trial, self.check)
        self.alone = self.adds and self.survivors.stands_alone(self.trial, self.check)
        self.apart = self.alone if self.adapts else self.adds
        moments = self._moments()
        fitted, held_out = _sum(moments, False), _sum(moments, True)
        # The first sequence of a source is never held out.
        assert fitted is not None
        prior = self.inputs.prior
        chosen = choose_fit(fitted, held_out, prior)
        errors = {group: part.error(chosen.weight) for group, part in moments.items()}
        held_out_error = None if held_out is None else held_out.error(chosen.weight)
        before, after, epoch, held_out_before = chosen.before, chosen.after, None, None
        if self.adapts:
            target = self._target()
            start = Write(*self.inputs.parts(chosen.weight.float()))
            inside, outside = fold_places(batches)
            if not self.alone:
                # Otherwise the least squares had the same target.
                before = total(evaluate(target, batches, inside, Write(*self.inputs.parts(prior))), target, batches, inside)
            dtype = descent_dtype(self.device)
            adapted = adapt(target, batches, self.survivors.read_leaves(), start, self.number, run.progress, dtype)
            errors, epoch, held_out_before = adapted.errors, adapted.epoch, adapted.held_out_before
            after = total(errors, target, batches, inside)
            held_out_error = total(errors, target, batches, outside) if outside else None
            self._finish(adapted.write)
        else:
            if held_out is not None:
                fitted += held_out
                chosen = fit(fitted, prior, chosen.damping)
            before, after = chosen.before, chosen.after
            self._finish(Write(*self.inputs.parts(chosen.weight)))
        condition = chosen.condition if math.isfinite(chosen.condition) else None
        return [
            LayerRecovery(
                self.block.layer_index,
                self.block.module,
                before,
                after,
                condition,
                chosen.damping,
                held_out_error,
                held_out_before,
                epoch,
                run.options.by_source(errors),
            )
        ]

    def _moments(self) -> dict[tuple[int, bool], Moments]:
        """The second moments of each source and fold. The spool then holds what the following steps need."""
        run = self.run
        moments: dict[tuple[int, bool], Moments] = {}
        for place, batch in enumerate(run.batches):
            hidden = run.get("cut", place)
            if self.adapts and self.alone:
                inputs, activations, without = self.survivors.read_and_run(self.calls[place], hidden)
                assert inputs is not None
                run.spool.put(("x", place), inputs)
            else:
                activations, without = self.survivors.run(self.calls[place], hidden)
            check_finite_states(self.block.module, activations, without)
            if batch.group not in moments:
                moments[batch.group] = Moments(self.inputs.count, self.ffn.outputs, self.device)
            if self.adds:
                wanted = run.get("dense", place).reshape(-1, self.ffn.outputs).float()
                wanted, weights = wanted - without.reshape(wanted.shape).float(), inverse_square(wanted)
            else:
                # The old bias stays in place, and the fit finds what is added to it.
                wanted = run.get("written", place)
                weights = inverse_square(wanted)
                wanted = wanted if self.survivors.bias is None else wanted - self.survivors.bias
            check_finite_states(self.block.module, wanted)
            with exact_products(self.device):
                moments[batch.group].add(self.inputs.of(activations), wanted, weights)
            if self.apart:
                run.spool.put(("cut", place), without)
            if self.adds and not self.adapts:
                run.spool.put(("u", place), activations)
            run.progress(len(batch.ids))
        return moments

    def _target(self) -> Target[Write]:
        if self.alone:
            return Alone(self.run, self.survivors)
        return InBlock(self.run, self.survivors, self.calls)

    def _finish(self, found: Write) -> None:
        """Keep the fitted weights, and pass the cut model's hidden states through them, rounded as the checkpoint stores them."""
        run, survivors, name = self.run, self.survivors, self.block.name
        dtypes = {item.role: stored_dtype(self.run.index.tensors[item.tensor], self.run.dtype) for item in self.block.tensors}
        values = {"weight": as_stored(found.weight, dtypes["write"])}
        shift = None
        if found.shift is not None and survivors.bias is not None:
            values["bias"] = as_stored(survivors.bias.cpu() + found.shift.cpu(), dtypes["write_bias"])
            shift = values["bias"].to(self.device, torch.float32) - survivors.bias
        if self.adapts:
            reads = {role: as_stored(rows, dtypes[role]) for role, rows in survivors.reads().items()}
            survivors.set_reads(reads, self.check.dtype)
            values |= reads
        for role, tensor in values.items():
            run.spool.put((role, name), tensor)
        run.roles[name] = tuple(values)
        write = Write(values["weight"].to(self.device, torch.float32), shift)
        for place in range(len(run.batches)):
            before = run.get("cut", place)
            if self.apart:
                activations = survivors.activations(run.get("x", place)) if self.adapts else run.get("u", place)
                after = before + write.of(activations).to(before.dtype).reshape(before.shape)
            else:
                _, after = survivors.run(self.calls[place], before, write)
            run.spool.put(("cut", place), after)
            for key in ("u", "written", "x"):
                run.spool.drop((key, place))
        with full_products():
            _, self.check = survivors.run(self.trial, self.check, write)

    def _pass_written(self) -> None:
        """`_Pass.pass_on` of the dense model that also keeps the FFN's output."""
        run = self.run
        written: list[torch.Tensor] = []
        interceptor = Interceptor(run.chain.model)
        interceptor.on(self.ffn.members[0].write.matrix, after=written.append)
        with interceptor:
            for place, batch in enumerate(run.batches):
                run.spool.put(("dense", place), run.chain.run(self.number, self.calls[place], run.get("dense", place)))
                run.spool.put(("written", place), written.pop().reshape(-1, self.ffn.outputs).float())
                run.progress(len(batch.ids))


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


def _sum(moments: Mapping[tuple[int, bool], Moments], held_out: bool) -> Moments | None:
    """The moments of one fold over all sources; None if there are none. Those of a single source are not copied."""
    parts = [part for (_, out), part in moments.items() if out == held_out]
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0]
    result = parts[0].copy()
    for part in parts[1:]:
        result += part
    return result


def _cut_of_each_block(plan: PruningPlan, streamed: StreamedModel) -> Mapping[int, list[tuple[BlockPlan, FFN]]]:
    """Number of a block in the chain to the FFNs in that block that are cut."""
    found: dict[int, list[tuple[BlockPlan, FFN]]] = defaultdict(list)
    for block, ffn in zip(plan.blocks, match_ffns(plan.blocks, streamed.ffns), strict=True):
        if not block.is_cut:
            continue
        number = streamed.chain.number_of(block.module)
        if ffn is None or number is None:
            raise ModelError(f"{block.module} is not among the FFNs of the model's list of blocks")
        found[number].append((block, ffn))
    return dict(found)
