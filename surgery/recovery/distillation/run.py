"""Train the FFNs of a cut model together, without labels, until it predicts what the dense model predicts.

The loss is KL(dense || cut) of the distributions of the next token, over all positions of the refit's tokens. Only the kept
channels of the FFNs that are cut are trained, in float32. Everything else is frozen, and so is the same in both models. The
dense model therefore runs only once: its last hidden states are spooled, and the output matrix of the cut model turns them
into the dense model's logits. Then the same model in memory is cut, and gets the weights of the refit that the distillation
starts from.

A part of the sequences is held out. The result has the weights that were best there, those of the start among them, rounded
as the result stores them.

Several processes that torchrun started train together. The first one makes the refit and writes everything; the sequences of
each step are divided among all of them, and their gradients are added up in the first one, which gives the sum to all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import hashlib
import json
from collections import defaultdict
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from chanfmt.base.errors import ChanfmtError, ModelError, UsageError
from chanfmt.base.narrate import say
from chanfmt.base.version import __version__
from chanfmt.models.distributed import joined
from chanfmt.models.load import load_model, pick_device
from chanfmt.models.run import vocabulary
from chanfmt.models.streaming.blocks import outer_lists
from chanfmt.models.streaming.parameters import stored_dtype as model_dtype
from chanfmt.models.streaming.spool import Spool
from surgery.cut.checkpoint.rounding import stored_dtype
from surgery.recovery.distillation.descent import NOT_FINITE, descend, first_state
from surgery.recovery.distillation.divergence import differentiate, divergence
from surgery.recovery.distillation.halves import Halves
from surgery.recovery.distillation.memory import estimate, saves_activations
from surgery.recovery.distillation.state_file import Before, StateFile
from surgery.recovery.distillation.student import Student
from surgery.recovery.folds import fold_places, split_batches
from surgery.recovery.options import Distillation, SourceDivergence
from surgery.recovery.precision import descent_dtype, fast_products, full_products, half_products, in_float32
from surgery.recovery.refit import CHECK_TOKENS, Refitted, refitted
from surgery.recovery.resume import request_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from chanfmt.models.distributed import Group
    from chanfmt.models.source import ModelSource
    from surgery.planning.plan import PruningPlan
    from surgery.recovery.distillation.descent import State
    from surgery.recovery.folds import Batch
    from surgery.recovery.options import LayerRecovery, Refit
    from surgery.recovery.workplace import Workplace

PATIENCE = datetime.timedelta(hours=12)
"""How long processes wait for each other: as long as the first one may take for the refit that the distillation starts from."""
STEP_TOKENS = 1024
"""Tokens of a step."""
MEASURED_TOKENS = 16_384
"""Held-out tokens that are measured, at most: many times during the training, which would take most of the time."""
PASSES = 4
"""Passes over the fitted tokens, unless the number of steps is given."""
MOST_STEPS = 400
"""Largest number of steps, unless the number is given."""


@contextlib.contextmanager
def distilled(
    plan: PruningPlan,
    source: ModelSource,
    options: Refit,
    workplace: Workplace,
) -> Iterator[Refitted]:
    """Refit the cut that ``plan`` makes of the dense model ``source`` as ``options.start`` says, and then distil it.

    The state is written to the workplace as often as ``options`` say. The same call goes on from there after a kill. The file is
    removed when the body ends without an error.

    Args:
        options: Tokens, start, steps, device and memory of the work.

    Raises:
        ModelError: The model does not predict tokens, or is of a kind that cannot be refitted or cut in memory.
        ChanfmtError: Memory or disk space runs out.
    """
    with joined(options.device, PATIENCE) as group:
        yield from _distilled(plan, source, options, workplace, group)


def _distilled(plan: PruningPlan, source: ModelSource, options: Refit, workplace: Workplace, group: Group) -> Iterator[Refitted]:
    experts = next((block for block in plan.blocks if block.is_cut and block.n_experts), None)
    if experts is not None:
        raise ModelError(
            f"--recover distill trains only dense FFNs, and {experts.module} has {experts.n_experts} routed experts",
            hint="cut only the dense FFNs with --stack NAME, or use another recovery",
        )

    def start() -> AbstractContextManager[Refitted]:
        return refitted(plan, source, dataclasses.replace(options, method=options.start), workplace)

    key = _key(plan, source, options, workplace.dtype)
    if len(set(group.exchange(key))) > 1:
        raise ChanfmtError("the processes are not given the same work", hint="start all of them with the same command and files")
    file = StateFile(workplace.directory / f"distill-{key[:16]}.partial", key, options.save_every)
    with _told(file):
        with Spool(options.spool_bytes, workplace.directory) as spool, fast_products(pick_device(group.device)):
            training = group.together(lambda: _Training(plan, source, options, spool, workplace.dtype, group))
            result = _result(training, file, start, workplace, group)
        # The check of the result needs the memory.
        gc.collect()
        yield result
    if group.rank == 0:
        file.remove()


def _result(
    training: _Training,
    file: StateFile,
    start: Callable[[], AbstractContextManager[Refitted]],
    workplace: Workplace,
    group: Group,
) -> Refitted:
    """Refit by ``start``, train and measure, from what ``file`` holds on."""
    leads = group.rank == 0

    def started() -> tuple[LayerRecovery, ...]:
        with start() as refit:
            training.put(refit)
            return refit.layers

    found = group.together(lambda: file.load(training.values) if leads else None)
    if not group.exchange(found is not None)[0]:
        layers = group.together(lambda: started() if leads else ())
        found = training.begin(group.exchange(layers)[0])
        if leads:
            file.save(*found)
    else:
        found = training.resumed(found)
        say(f"the distillation goes on after step {found[0].step}, from {file.path}")
    state, before = found
    # The refit counts in a total of its own.
    workplace.begin(training.steps * training.size)
    workplace.progress(state.step * training.size)
    after = partial(_after, file, before, training.size, workplace.progress) if leads else _nothing
    training.run(state, after)
    return training.finished(state, before)


def _after(file: StateFile, before: Before, size: int, progress: Callable[[int], object], state: State) -> None:
    file.save(state, before)
    progress(size)


def _nothing(state: State) -> None:
    """Leave the file to the first process."""


@contextlib.contextmanager
def _told(file: StateFile) -> Iterator[None]:
    """Add to an interrupt of the body how the work goes on."""
    try:
        yield
    except KeyboardInterrupt:
        way_out = file.way_out()
        if way_out is None:
            raise
        raise KeyboardInterrupt(way_out) from None


def _key(plan: PruningPlan, source: ModelSource, options: Refit, dtype: str | None) -> str:
    """SHA-256 of all that the result depends on."""
    words = [request_of(plan, source, options, pick_device(options.device), dtype), STEP_TOKENS, PASSES]
    words += [__version__, version("torch"), version("transformers")]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _precision(source: ModelSource, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the frozen weights, and that of products.

    On a GPU, a checkpoint in 16 bits is trained in bfloat16. float16 would need a scaled loss, so float16 weights are loaded
    in float32. On a CPU, weights are in float32, and products in what is fast (`descent_dtype`).
    """
    if device.type == "cpu":
        return torch.float32, descent_dtype(device)
    stored = model_dtype(source)
    products = torch.bfloat16 if stored in (torch.bfloat16, torch.float16) else torch.float32
    return (torch.bfloat16 if stored == torch.bfloat16 else torch.float32), products


class _Training:
    """The cut model in memory, and what it should predict.

    Attributes:
        student: The cut model.
        steps: Number of steps to make.
        size: Sequences of a step.
    """

    def __init__(
        self, plan: PruningPlan, source: ModelSource, options: Refit, spool: Spool, dtype: str | None, group: Group
    ) -> None:
        assert options.tokens is not None
        self._plan, self._options, self._spool, self._group = plan, options, spool, group
        self._device = pick_device(group.device)
        length = options.tokens.shape[1]
        self.size = max(1, STEP_TOKENS // length)
        if group.size > self.size:
            raise UsageError(
                f"{group.size} processes cannot share a step of the distillation, which takes {self.size} sequences of {length} tokens",
                hint=f"start {self.size} processes" if self.size > 1 else "run the command without torchrun",
            )
        kind, self._products = _precision(source, self._device)
        recompute = saves_activations(estimate(plan, source.index, kind, self.size * length), self._device)
        self._batches = split_batches(options.tokens, options.source_of, self.size)
        self._fitted, held = fold_places(self._batches)
        self._held = _spread(held, max(1, MEASURED_TOKENS // (self.size * length)))
        self._sample = _sample(self._batches, self._held)
        self.steps = options.steps or min(MOST_STEPS, PASSES * len(self._fitted))
        self._model = load_model(source, dtype=str(kind).removeprefix("torch."), device=group.device)
        self._halves = Halves(self._model)
        self._vocabulary = vocabulary(self._model)
        with torch.no_grad(), self._autocast():
            for number in range(len(self._batches)):
                if len(ids := self._ids(number)):
                    spool.put(number, self._halves.hidden(ids))
        self._blocks = [module for _, modules in outer_lists(self._model) for module in modules] if recompute else []
        self.student = Student(self._model, plan, _dtypes(plan, source, dtype))

    @property
    def values(self) -> list[torch.Tensor]:
        """The values of the trained parameters."""
        return [leaf.parameter.data for leaf in self.student.leaves]

    def put(self, start: Refitted) -> None:
        """Give the model the weights of ``start``."""
        for block in self._plan.blocks:
            if block.is_cut:
                self.student.put(block.name, start.fitted(block.name))

    def begin(self, layers: tuple[LayerRecovery, ...]) -> tuple[State, Before]:
        """The state before the first step, with the weights that the model of the first process has after a refit of ``layers``."""
        self._group.spread(self.values)
        before = Before(layers, self._measured(self._sample), self._measured(self._held))
        return first_state(self.student.leaves, self._mean(before.held_out, self._held) or 0.0), before

    def resumed(self, found: tuple[State, Before] | None) -> tuple[State, Before]:
        """The state and what was known before it that the first process has ``found``, in all processes."""
        told = None if found is None else (found[0].rates, found[0].step, found[0].history, found[1])
        told = self._group.exchange(told)[0]
        assert told is not None
        rates, step, history, before = told
        state = first_state(self.student.leaves, 0.0) if found is None else found[0]
        self._group.spread([*state.weights, *state.first, *state.second, *state.best])
        return dataclasses.replace(state, rates=list(rates), step=step, history=list(history)), before

    def run(self, state: State, after: Callable[[State], object]) -> None:
        """Make the steps, and leave the best weights in the model, rounded as the result stores them."""
        with _computed_again(self._blocks):
            descend(self, self.student.leaves, state, len(self._fitted), self.steps, after)
        for leaf, values in zip(self.student.leaves, state.best, strict=True):
            leaf.parameter.data.copy_(values)
        self.student.round()

    def finished(self, state: State, before: Before) -> Refitted:
        """The weights that `run` left, and what they are worth."""
        fitted, held_out = self._measured(self._sample), self._measured(self._held)
        report = Distillation(
            self._options.start,
            state.step,
            state.best_step,
            self._mean(before.fitted, self._sample),
            self._mean(fitted, self._sample),
            self._mean(before.held_out, self._held),
            self._mean(held_out, self._held),
            tuple(
                SourceDivergence(name, *(means.get(number) for means in (before.fitted, fitted, before.held_out, held_out)))
                for number, name in enumerate(self._options.source_names)
            ),
            tuple((step, loss if loss < NOT_FINITE else None) for step, loss in state.history) if self._held else (),
        )
        ids = self._batches[0].ids[:1, :CHECK_TOKENS]
        blocks = [module for _, modules in outer_lists(self._model) for module in modules]
        # The check runs the file in float32.
        with torch.no_grad(), full_products(), in_float32(self._model, blocks):
            logits = self._halves.logits(self._halves.hidden(ids.to(self._device)))
        weights = {block.name: self.student.get(block.name) for block in self._plan.blocks if block.is_cut}
        return Refitted(before.layers, logits[0].float().cpu(), ids, weights.__getitem__, report)

    def differentiate(self, number: int) -> None:
        """Add the gradient of the mean divergence on fitted batch ``number`` to those of the weights."""
        self._group.together(partial(self._differentiate, self._fitted[number]))
        if self._group.size > 1:
            self._group.add_up([_gradient(leaf.parameter) for leaf in self.student.leaves])

    def _differentiate(self, place: int) -> None:
        """Add the part of the gradient that comes from the sequences of this process."""
        ids = self._ids(place)
        if not len(ids):
            return
        with self._autocast():
            with torch.enable_grad():
                cut = self._halves.hidden(ids)
            positions = self._batches[place].ids.numel()
            differentiate(self._halves.logits, self._dense(place), cut, self._vocabulary, positions)

    def _ids(self, place: int) -> torch.Tensor:
        """The sequences of a batch that this process computes, (sequence, position). There may be none."""
        ids = self._batches[place].ids
        first, end = self._group.share(0, len(ids))
        return ids[first:end].to(self._device)

    def held_out(self) -> float:
        """The mean divergence on the held-out sequences, of the weights as the result would store them."""
        with self.student.rounded():
            return self._mean(self._measured(self._held), self._held) or 0.0

    def _measured(self, places: Sequence[int]) -> dict[int, float]:
        """Number of each source of the batches ``places`` to the mean divergence of the present weights there."""
        sums: dict[int, float] = defaultdict(float)
        for part in self._group.exchange(self._group.together(partial(self._sums, places))):
            for source, value in part.items():
                sums[source] += value
        return {source: value / _tokens(self._batches, places, source) for source, value in sums.items()}

    def _sums(self, places: Sequence[int]) -> dict[int, float]:
        """Number of each source to the sum of the divergence over the sequences of this process."""
        sums: dict[int, float] = defaultdict(float)
        with torch.no_grad(), self._autocast():
            for place in places:
                if len(ids := self._ids(place)):
                    cut = self._halves.hidden(ids)
                    sums[self._batches[place].source] += divergence(
                        self._halves.logits, self._dense(place), cut, self._vocabulary
                    )
        return dict(sums)

    def _mean(self, means: Mapping[int, float], places: Sequence[int]) -> float | None:
        """The mean over all tokens of the batches ``places``, from the ``means`` of their sources; None if there are none."""
        counts = {source: _tokens(self._batches, places, source) for source in means}
        return sum(means[source] * count for source, count in counts.items()) / sum(counts.values()) if counts else None

    def _dense(self, place: int) -> torch.Tensor:
        return self._spool.get(place).to(self._device)

    def _autocast(self) -> torch.autocast:
        return half_products(self._device, self._products)


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient of ``parameter`` as it can be sent. It is 0 if this process had no sequence."""
    found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
    parameter.grad = found
    return found


def _dtypes(plan: PruningPlan, source: ModelSource, dtype: str | None) -> dict[tuple[str, str], str]:
    """Name and role of every tensor of an FFN that is cut to the safetensors dtype that the result stores it in."""
    return {
        (block.name, item.role): stored_dtype(source.index.tensors[item.tensor], dtype)
        for block in plan.blocks
        if block.is_cut
        for item in block.tensors
    }


def _spread(places: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of ``places``, evenly spread over them, so that every source keeps about its share."""
    count = min(most, len(places))
    return [places[number * len(places) // count] for number in range(count)]


def _sample(batches: Sequence[Batch], held_out: Sequence[int]) -> list[int]:
    """Numbers of the first fitted batches of each source: about as many sequences as ``held_out`` has, and at least one batch."""
    left: dict[int, int] = defaultdict(int)
    for number in held_out:
        left[batches[number].source] += len(batches[number].ids)
    found, seen = [], set()
    for number, batch in enumerate(batches):
        if not batch.held_out and (left[batch.source] > 0 or batch.source not in seen):
            found.append(number)
            seen.add(batch.source)
            left[batch.source] -= len(batch.ids)
    return found


def _tokens(batches: Sequence[Batch], places: Sequence[int], source: int) -> int:
    return sum(batches[place].ids.numel() for place in places if batches[place].source == source)


@contextlib.contextmanager
def _computed_again(blocks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """In the body, ``blocks`` keep only their inputs for the backward pass, and are computed again there."""
    forwards: list[tuple[torch.nn.Module, Any]] = [(block, block.forward) for block in blocks]
    for block, forward in forwards:
        block.forward = partial(checkpoint, forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, _ in forwards:
            del block.forward
