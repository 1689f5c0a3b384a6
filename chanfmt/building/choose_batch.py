"""Choose the batch of a build from what it will need and what is free, before anything is measured."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from chanfmt.base.errors import ChanfmtError, first_line
from chanfmt.base.memory import free_swap
from chanfmt.base.narrate import say
from chanfmt.building.memory_probe import probe_in_memory, probe_streamed
from chanfmt.building.predicted_memory import Choice, choice_of, gigabytes, largest_batch
from chanfmt.data.tokens import CalibrationTokens
from chanfmt.format.records import MEMORY_PREDICTION
from chanfmt.models.device_memory import free_memory
from chanfmt.models.out_of_memory import free_cached_memory, out_of_memory_recognised
from chanfmt.models.run import usual_batch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chanfmt.building.plan import BuildPlan
    from chanfmt.building.predicted_memory import Stage
    from chanfmt.format.records import ProducerRecord
    from chanfmt.models.distributed import Group


@dataclass(frozen=True)
class Batch:
    """The batch that a build begins with.

    Attributes:
        size: Sequences in a batch of one process.
        tight: Whether memory is so short that a CPU must give back freed memory at once; see `Choice`.
        record: What the atlas records of the prediction; None if there is none.
    """

    size: int
    tight: bool = False
    record: Mapping[str, object] | None = None


def choose_batch(plan: BuildPlan, group: Group) -> Batch:
    """Choose the batch of each process of ``group``, and say what it needs. The model of ``plan`` is loaded.

    The size is the usual one if it fits, and otherwise the largest of its half, a quarter and so on that fits. A size that the
    user gave is taken, whatever is predicted for it.

    Raises:
        ChanfmtError: Not even one sequence fits.
        LostProcessError: Another process is gone.
    """
    device = next(plan.model.parameters()).device if plan.streamed is None else plan.streamed.chain.device
    usual = plan.options.batch or usual_batch(device, plan.tokens.rows)
    choice = group.together(lambda: _choice(plan, usual, device, group))
    # Every process takes a part of each batch, so that all have the same size.
    fewest = min(group.exchange(usual if choice is None else _size(choice, plan, usual, group)))
    if choice is None:
        return Batch(fewest)
    return Batch(fewest, choice.tight, choice.record("streamed" if plan.streamed else "in memory"))


def was_tight(record: ProducerRecord) -> bool:
    """Whether the build of ``record`` gave back freed memory at once, because memory was short."""
    return any((line.get(MEMORY_PREDICTION) or {}).get("tight") for line in record.history)


def _choice(plan: BuildPlan, usual: int, device: torch.device, group: Group) -> Choice | None:
    """What this process can run; None if that cannot be predicted."""
    fixed = plan.options.batch is not None
    try:
        with out_of_memory_recognised():
            stages = _stages(plan)
    except torch.OutOfMemoryError:
        free_cached_memory(device)
        if fixed:
            return None
        raise ChanfmtError(f"out of memory on {device} with a part of one sequence", hint=_levers(plan, device)) from None
    # Some models do not run short sequences. A build that can run must not end because it cannot be predicted.
    except Exception as error:
        say(f"note: the memory of a batch cannot be predicted ({first_line(error)})")
        return None
    finally:
        free_cached_memory(device)
    free = {name: _free(torch.device(name), group) for name in stages}
    most, length, resident = min(usual, _most(plan, group)), plan.tokens.seq_len, _resident(plan.model)
    # A streamed pass gives back freed memory anyway.
    tight = plan.streamed is not None
    if fixed:
        choice = choice_of(stages, most, length, free, resident, tight=tight)
        choice = choice if choice.fits else choice_of(stages, most, length, free, resident)
        say(choice.text() if choice.fits else f"note: {choice.text()}, so it may not fit")
        return choice
    choice = largest_batch(stages, most, length, free, resident, tight=tight)
    if not choice.fits:
        assert choice.free is not None
        if choice.device == "cpu" and choice.needed <= choice.free + free_swap():
            say(f"note: {choice.text()}, so it may need swap space")
            return choice
        found = choice.prediction
        raise ChanfmtError(
            f"one sequence of {length} tokens does not fit on {choice.device}: it needs about {gigabytes(choice.needed)} of "
            f"{gigabytes(choice.free)} free ({gigabytes(found.statistics)} for statistics, {gigabytes(found.activations)} for "
            f"activations{f', {gigabytes(found.spool)} for block inputs' if found.spool else ''})",
            hint=f"{_levers(plan, device)}; --batch-size 1 tries it anyway",
        )
    say(choice.text())
    return choice


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


def _levers(plan: BuildPlan, device: torch.device) -> str:
    """What the user can do if one sequence does not fit, the most helpful first."""
    levers = []
    if isinstance(plan.tokens, CalibrationTokens):
        levers = ["a smaller --seq-len"] if plan.streamed else ["--stream", "a smaller --seq-len"]
    if plan.streamed and device.type == "cpu":
        levers.append("a smaller --spool-limit")
    if plan.record.dtype in ("float32", "float64"):
        levers.append("--dtype bfloat16")
    if device.type != "cpu":
        levers.append("--device cpu")
    return f"use {', '.join(levers[:-1])}{' or ' if levers[1:] else ''}{levers[-1]}" if levers else "use a larger machine"
