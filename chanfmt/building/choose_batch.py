"""Choose the order of a pass and its batch from what they will need and what is free, before anything is measured."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from chanfmt.base.errors import ChanfmtError, first_line
from chanfmt.base.memory import free_swap
from chanfmt.base.narrate import say
from chanfmt.base.text import gigabytes
from chanfmt.building.memory_probe import probe_in_memory, probe_streamed
from chanfmt.building.options import AUTO, RECOMPUTE, STREAM, WHOLE
from chanfmt.building.plan import may_stream, recomputing
from chanfmt.building.predicted_memory import Choice, choice_of, largest_batch
from chanfmt.data.tokens import CalibrationTokens
from chanfmt.format.records import MEMORY_PREDICTION
from chanfmt.models.device_memory import free_memory
from chanfmt.models.out_of_memory import free_cached_memory, out_of_memory_recognised
from chanfmt.models.run import usual_batch
from chanfmt.models.streaming.blocks import UnstreamableError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chanfmt.building.plan import BuildPlan
    from chanfmt.building.predicted_memory import Stage
    from chanfmt.format.records import ProducerRecord
    from chanfmt.models.distributed import Group


_ORDERS = {
    WHOLE: ("in memory", "whole graph"),
    RECOMPUTE: ("recomputed", "block by block, with the weights in memory"),
    STREAM: ("streamed", "block by block, with one block's weights"),
}
"""Each order of a pass, as the atlas records it and as the user reads it."""


@dataclass(frozen=True)
class Batch:
    """The order and the batch that a build begins with.

    Attributes:
        size: Sequences in a batch of one process.
        plan: The plan, with the order chosen; None if the model must be opened for `STREAM`, because its weights leave no room.
        tight: Whether memory is so short that a CPU must give back freed memory at once; see `Choice`.
        record: What the atlas records of the prediction; None if there is none.
    """

    size: int
    plan: BuildPlan | None
    tight: bool = False
    record: Mapping[str, object] | None = None


@dataclass(frozen=True)
class _Attempt:
    """What was predicted for one order.

    Attributes:
        plan: The plan, in that order.
        choice: What the process can run; None if that cannot be predicted.
        exhausted: Whether memory ran out with a part of one sequence.
        refused: Whether the model can only be run with the weights of all blocks at a time.
    """

    plan: BuildPlan
    choice: Choice | None = None
    exhausted: bool = False
    refused: bool = False

    @property
    def fits(self) -> bool:
        return not self.exhausted and (self.choice is None or self.choice.fits)

    @property
    def text(self) -> str:
        name = _ORDERS[self.plan.order][1]
        return f"{name}, {self.choice.text()}" if self.choice is not None else f"{name}: a part of one sequence does not fit"


def choose_batch(plan: BuildPlan, group: Group) -> Batch:
    """Choose the order and the batch of each process of ``group``, and say what it needs. The model of ``plan`` is loaded.

    If the user leaves the order to the build, it is the whole graph if one sequence of it fits; otherwise block by block. The
    size is the usual one if it fits, and otherwise the largest of its half, a quarter and so on that fits. A size that the
    user gave is taken, whatever is predicted for it.

    Raises:
        ChanfmtError: Not even one sequence fits.
        LostProcessError: Another process is gone.
    """
    usual = plan.options.batch or usual_batch(_device(plan), plan.tokens.rows)
    found = group.together(lambda: _settled(plan, usual, group))
    if found is None:
        return Batch(0, None)
    choice = found.choice
    # Every process takes a part of each batch, so that all have the same size.
    fewest = min(group.exchange(usual if choice is None else _size(choice, plan, usual, group)))
    if choice is None:
        return Batch(fewest, found.plan)
    return Batch(fewest, found.plan, choice.tight, choice.record(_ORDERS[found.plan.order][0]))


def was_tight(record: ProducerRecord) -> bool:
    """Whether the build of ``record`` gave back freed memory at once, because memory was short."""
    return any((line.get(MEMORY_PREDICTION) or {}).get("tight") for line in record.history)


def _settled(plan: BuildPlan, usual: int, group: Group) -> _Attempt | None:
    """What this process runs; None if only `STREAM` can fit, and the model is not opened for it. Says which, or why."""
    found = _attempt(plan, usual, group)
    tried = [found]
    if not found.fits and plan.options.order == AUTO and plan.order == WHOLE and _one_by_one(plan, group):
        say(f"note: {found.text}")
        found = _recomputed(plan, usual, group)
        if not found.fits and not found.refused and plan.options.batch is None and may_stream(plan.options, plan.source):
            say(f"note: {found.text}")
            _close(found)
            return None
        tried.append(found)
    if found.fits:
        if found.choice is not None:
            say(found.text)
        return found
    # The order that needs least is tried in spite of the prediction, if the user or swap space allows that.
    found = min(tried, key=lambda attempt: attempt.choice.needed if attempt.choice is not None else float("inf"))
    for attempt in tried:
        if attempt is not found and attempt.plan is not plan:
            _close(attempt)
    choice = found.choice
    if plan.options.batch is not None:
        if choice is not None:
            say(f"note: {found.text}, so it may not fit")
        return found
    if choice is not None and choice.device == "cpu" and choice.needed <= (choice.free or 0) + free_swap():
        say(f"note: {found.text}, so it may need swap space")
        return found
    _close(found)
    raise _does_not_fit(found, group)


def _does_not_fit(found: _Attempt, group: Group) -> ChanfmtError:
    device, length = _device(found.plan), found.plan.tokens.seq_len
    levers = _levers(found.plan, device, group)
    if found.choice is None:
        return ChanfmtError(f"out of memory on {device} with a part of one sequence", hint=levers)
    choice, needs = found.choice, found.choice.prediction
    assert choice.free is not None
    return ChanfmtError(
        f"one sequence of {length} tokens does not fit on {choice.device}: it needs about {gigabytes(choice.needed)} of "
        f"{gigabytes(choice.free)} free ({gigabytes(needs.statistics)} for statistics, {gigabytes(needs.activations)} for "
        f"activations{f', {gigabytes(needs.spool)} for block inputs' if needs.spool else ''})",
        hint=f"{levers}; --batch-size 1 tries it anyway",
    )


def _recomputed(plan: BuildPlan, usual: int, group: Group) -> _Attempt:
    """What was predicted for `RECOMPUTE`. If the pass will not run in this order, the model is as it was."""
    try:
        other = recomputing(plan)
    except UnstreamableError:
        return _Attempt(plan, exhausted=True, refused=True)
    return _attempt(other, usual, group)


def _close(attempt: _Attempt) -> None:
    """Give the model its blocks back, if the attempt ran them one after the other."""
    if attempt.plan.streamed is not None:
        attempt.plan.streamed.chain.close()


def _one_by_one(plan: BuildPlan, group: Group) -> bool:
    """Whether the blocks may run one after the other, as far as that can be said before the model is looked at."""
    return group.size == 1 and isinstance(plan.tokens, CalibrationTokens) and not plan.options.device_map


def _attempt(plan: BuildPlan, usual: int, group: Group) -> _Attempt:
    """What is predicted for ``plan`` in its order."""
    device = _device(plan)
    try:
        with out_of_memory_recognised():
            stages = _stages(plan)
    except torch.OutOfMemoryError:
        return _Attempt(plan, exhausted=True)
    # Some models do not run short sequences. A build that can run must not end because it cannot be predicted.
    except Exception as error:
        say(f"note: the memory of a batch cannot be predicted ({first_line(error)})")
        return _Attempt(plan)
    finally:
        free_cached_memory(device)
    free = {name: _free(torch.device(name), group) for name in stages}
    most, length, resident = min(usual, _most(plan, group)), plan.tokens.seq_len, _resident(plan.model)
    # A streamed pass gives back freed memory anyway.
    tight = plan.order == STREAM
    if plan.options.batch is None:
        return _Attempt(plan, largest_batch(stages, most, length, free, resident, tight=tight))
    choice = choice_of(stages, most, length, free, resident, tight=tight)
    return _Attempt(plan, choice if choice.fits else choice_of(stages, most, length, free, resident))


def _device(plan: BuildPlan) -> torch.device:
    device: torch.device = next(plan.model.parameters()).device if plan.streamed is None else plan.streamed.chain.device
    return device


def _size(choice: Choice, plan: BuildPlan, usual: int, group: Group) -> int:
    """The size of the batch for ``choice``, which knows the largest batch that there is, where ``usual`` may be larger."""
    return usual if choice.sequences == min(usual, _most(plan, group)) else choice.sequences


def _most(plan: BuildPlan, group: Group) -> int:
    """Sequences in the largest batch of one process: all sequences of a batch belong to one split."""
    return max(1, -(-max(Counter(plan.tokens.split_of.tolist()).values()) // group.size))


def _stages(plan: BuildPlan) -> dict[str, list[Stage]]:
    more: dict[str, Any] = {"rho": plan.settings.rho, "loss": plan.loss, "columns": plan.columns}
    if plan.streamed is None:
        return probe_in_memory(plan.model, plan.ffns, plan.tokens, **more)
    assert isinstance(plan.tokens, CalibrationTokens)
    return probe_streamed(plan.streamed, plan.tokens, **more, spool_limit=int(plan.options.spool_limit * 2**30))


def _free(device: torch.device, group: Group) -> int | None:
    """Bytes that are free for this process. The processes of one machine share its memory, and each has a GPU of its own."""
    # Without torchrun, the processes of a group are not known to share a machine.
    return free_memory(device, 1 if group.size == 1 else int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _resident(model: Any) -> Mapping[str, int]:
    """Bytes of the weights that lie on each device."""
    found: Counter[str] = Counter()
    for parameter in model.parameters():
        if not parameter.is_meta:
            found[str(parameter.device)] += parameter.nbytes
    return found


def _levers(plan: BuildPlan, device: torch.device, group: Group) -> str:
    """What the user can do if one sequence does not fit, the most helpful first."""
    levers = []
    if isinstance(plan.tokens, CalibrationTokens):
        if plan.order != STREAM:
            levers.append("--stream")
        if plan.order == WHOLE and plan.options.order == WHOLE and _one_by_one(plan, group):
            levers.append("--memory recompute")
        levers.append("a smaller --seq-len")
    if plan.order != WHOLE and device.type == "cpu":
        levers.append("a smaller --spool-limit")
    if plan.record.dtype in ("float32", "float64"):
        levers.append("--dtype bfloat16")
    if device.type != "cpu":
        levers.append("--device cpu")
    return f"use {', '.join(levers[:-1])}{' or ' if levers[1:] else ''}{levers[-1]}" if levers else "use a larger machine"
