"""Measure a model and write its atlas."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
from typing import TYPE_CHECKING

import torch

from chanfmt.base.claims import claimed
from chanfmt.base.errors import ChanfmtError, UsageError
from chanfmt.base.files import check_target
from chanfmt.base.narrate import say, silenced, warn
from chanfmt.base.processes import processes
from chanfmt.building.assemble import assemble, assemble_partial
from chanfmt.building.choose_batch import choose_batch, was_tight
from chanfmt.building.keeper import Keeper
from chanfmt.building.options import AUTO, ORDERS, RECOMPUTE, STREAM
from chanfmt.building.plan import plan_build, recomputing
from chanfmt.building.resume import check_alike, clear_way, remove_finished, request_of, take_up
from chanfmt.building.run_pass import run_pass
from chanfmt.building.session import begin_session, environment_of
from chanfmt.building.state import order_left
from chanfmt.format.writer import write_atlas
from chanfmt.models.distributed import LostProcessError, joined
from chanfmt.models.load import HALF
from chanfmt.models.out_of_memory import out_of_memory_recognised
from chanfmt.models.streaming.parameters import freed_memory_returned
from chanfmt.models.streaming.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from chanfmt.building.options import BuildOptions
    from chanfmt.building.plan import BuildPlan, Locate
    from chanfmt.format.records import LabelSettings


def build(options: BuildOptions, settings: LabelSettings, locate: Locate) -> Path:
    """Measure the model that ``options`` name, and write its atlas. Returns the path of the atlas.

    A long pass is saved to ``options.partial`` on the way; with ``options.resume`` a build continues from there. If torchrun
    started several processes, all of them call this function: they measure together, and the first one writes.

    Args:
        options: What to measure, on what, and the path of the atlas.
        settings: How channels are labelled.
        locate: Finds the model that ``options.model`` names, such as `chanfmt.hub.locate.locate_model`.

    Raises:
        ChanfmtError: Something that the user can mend. A partial atlas stays; nothing else is left behind.
        LostProcessError: Another process died. What it had measured since the last partial atlas is lost.
        KeyboardInterrupt: Ctrl-C. If there is a partial atlas, the text of the exception says how to continue.
    """
    options.check()
    options = _continued(options)
    _check_processes(options)
    with (
        _telling_how_to_continue(options),
        joined(options.device) as group,
        contextlib.nullcontext() if group.rank == 0 else silenced(),
        contextlib.ExitStack() as stack,
    ):
        options = dataclasses.replace(options, device=group.device)
        group.together(lambda: stack.enter_context(_claimed(options)) if group.rank == 0 else None)
        group.together(lambda: clear_way(options, locate, group))
        plan = group.together(lambda: plan_build(options, settings, locate))
        if options.order == RECOMPUTE:
            plan = recomputing(plan)
        if plan.streamed is not None:
            stack.callback(plan.streamed.chain.close)
        request, environment = request_of(plan), environment_of(plan.model)
        check_alike(request, group)
        partial = group.together(lambda: take_up(plan, request, environment) if group.rank == 0 else None)
        _narrate(plan)
        # An unfinished build keeps its batch, which the first process reads from the partial atlas.
        continued = group.exchange(partial is not None)[0]
        batch = None if continued else choose_batch(plan, group)
        if batch is not None and batch.plan is None:
            # The loaded weights must be gone before the model is opened again.
            del plan
            gc.collect()
            plan = plan_build(dataclasses.replace(options, memory=STREAM), settings, locate)
            batch = choose_batch(plan, group)
        if batch is not None and batch.plan is not None:
            plan = batch.plan
            request = request_of(plan)
        if plan.streamed is not None:
            # What is closed already stays as it is.
            stack.callback(plan.streamed.chain.close)
        tight = batch.tight if batch else group.exchange(partial is not None and was_tight(partial.producer))[0]
        session = begin_session(partial, plan.model, batch.record if batch else None)
        keeper = Keeper(
            options.partial,
            options.checkpoint_every,
            lambda measurement: assemble_partial(plan, measurement, session, request, environment),
        )
        with Spool(int(options.spool_limit * 2**30), options.path.absolute().parent) as spool:
            with freed_memory_returned() if tight and plan.order != STREAM else contextlib.nullcontext():
                measurement = run_pass(
                    plan, partial.state if partial else None, keeper, group, spool, first_size=batch.size if batch else None
                )

            def finish() -> None:
                with keeper.saving_on_failure(measurement), _labelling():
                    write_atlas(assemble(plan, measurement, session), options.path, overwrite=options.overwrite)
                keeper.remove()

            group.together(lambda: finish() if group.rank == 0 else None)
    return options.path


@contextlib.contextmanager
def _labelling() -> Iterator[None]:
    """Say what to do if the memory of the device does not suffice for the labels."""
    try:
        with out_of_memory_recognised():
            yield
    except torch.OutOfMemoryError:
        raise ChanfmtError(
            "out of memory while the channels are labelled", hint="use --stream, --dtype bfloat16, or --device cpu"
        ) from None


def _claimed(options: BuildOptions) -> AbstractContextManager[None]:
    """The claim on the output of a build. Raises `UsageError` for options or an output that cannot be used."""
    options.check()
    remove_finished(options)
    check_target(options.path, overwrite=options.overwrite)
    return claimed(options.path)


def _continued(options: BuildOptions) -> BuildOptions:
    """``options``; if they continue an unfinished build and leave the order to it, with the order of that build."""
    if not options.resume or options.order != AUTO:
        return options
    left = order_left(options.partial) if os.path.lexists(options.partial) else None
    return dataclasses.replace(options, memory=left) if left in ORDERS else options


def _check_processes(options: BuildOptions) -> None:
    """Raise `UsageError` if torchrun started several processes and the build is of a kind that runs in one."""
    if processes() == 1:
        return
    if options.order in (RECOMPUTE, STREAM):
        raise UsageError(
            f"{options.order_flag} runs in one process, and torchrun started several", hint="run it without torchrun"
        )
    if options.device_map:
        raise UsageError(
            "--device-map gives one process all GPUs, and torchrun started several",
            hint="start it without torchrun, or leave out --device-map",
        )


@contextlib.contextmanager
def _telling_how_to_continue(options: BuildOptions) -> Iterator[None]:
    """Say in an interrupt, or in the loss of a process, how to continue, if there is a partial atlas."""
    way_out = f"{options.partial} holds what was measured; continue with the same command and --resume"
    try:
        yield
    except KeyboardInterrupt:
        if os.path.lexists(options.partial):
            raise KeyboardInterrupt(way_out) from None
        raise
    except LostProcessError as error:
        if os.path.lexists(options.partial):
            error.hint = way_out
        raise


def _narrate(plan: BuildPlan) -> None:
    say(
        f"{plan.source.id}: {len(plan.ffns)} FFNs, {plan.channels:,} channels; "
        f"{len(plan.tokens)} x {plan.tokens.seq_len} tokens of "
        f"{', '.join(source.name for source in plan.sources)}",
    )
    for reason in plan.refusals:
        warn(f"the model can be measured, but surgery prune will refuse it: {reason}")
    if plan.record.dtype in HALF:
        say(f"note: {plan.record.dtype} rounds activations and gradients: part of the halo is another than in float32 (--dtype)")
    if plan.width_note:
        say(f"note: {plan.width_note}")
