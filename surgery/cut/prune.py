"""From an atlas, or from a plan, to a smaller model that is on disk and checked."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from chanfmt.base.claims import claimed
from chanfmt.base.errors import UsageError
from chanfmt.base.files import output_path
from chanfmt.base.narrate import say, warn
from chanfmt.base.processes import rank
from chanfmt.hub.locate import opened
from chanfmt.models.load import pick_device
from surgery.cut.apply import apply_plan, check_output
from surgery.cut.gguf.size import check_biases_of, check_gguf_output, in_format
from surgery.cut.options import CUT_DEFAULTS, CutOptions
from surgery.cut.source import find_model
from surgery.planning.file import load_plan
from surgery.planning.formats import GGUF, uneven_gguf
from surgery.planning.layouts import UNIFORM, needs_code
from surgery.planning.plan import make_plan
from surgery.planning.shrink import check_plan
from surgery.planning.target import BYTES
from surgery.recovery.options import NO_RECOVERY, Recovery, RecoveryOptions, Refit, plan_recovery
from surgery.recovery.processes import check_processes
from surgery.result.names import default_name
from surgery.result.result import Result

if TYPE_CHECKING:
    import os

    from chanfmt.format.reader import Atlas
    from chanfmt.models.source import ModelSource
    from surgery.planning.options import PlanOptions
    from surgery.planning.plan import PruningPlan

    Model = ModelSource | str | os.PathLike[str]


def prune(
    atlas: Atlas,
    model: Model | None,
    output: str | os.PathLike[str] | None,
    plan_options: PlanOptions,
    cut_options: CutOptions = CUT_DEFAULTS,
    recovery_options: RecoveryOptions = NO_RECOVERY,
    *,
    revision: str | None = None,
) -> Result:
    """Cut the model of ``atlas`` and publish the smaller model as a directory, whole or not at all.

    The open ``atlas`` gives the scores, the tokens or sums of the recovery, and the copy that travels with the result.
    If the file changes in between, nothing is written.

    Args:
        atlas: A complete atlas, open until this returns.
        model: The model that the atlas measured: its files, a Hub id, a directory or a ``.gguf`` file. None for the model
            that the atlas names, from the Hub, at the commit that was measured.
        output: Directory to write; None for `surgery.result.names.default_name` in the current directory.
        plan_options: Which channels are removed.
        cut_options: How the result is written and checked.
        recovery_options: How the kept channels are refitted.
        revision: Branch, tag or commit on the Hub, in place of the measured one.

    Returns:
        The result, with the record of what was removed, written and checked.

    Raises:
        UsageError: An option has no meaning for this model, the protected channels do not fit, the file would hardly shrink,
            or ``output`` cannot be written.
        AtlasError: The atlas is unfinished, lacks what an option needs, or changed on disk.
        ModelError: The model cannot be found or fetched, is not the atlas's model, or stock code could not load the result.
        CheckError: The result did not pass its checks.
        ChanfmtError: The disk is full or fails.
    """
    recovery_options.check()
    plan = make_plan(atlas, in_format(plan_options, cut_options, atlas.blocks, model, recovery_options.recover))
    if plan.sized is not None:
        say(str(plan.sized))
    for warning in plan.warnings:
        warn(warning)
    if not cut_options.allow_padding:
        _check_size(plan)
    recovery = _planned(recovery_options, atlas, plan)
    result = apply(plan, model, output, cut_options, revision=revision, atlas=atlas, recovery=recovery)
    if plan.sized is not None and plan.sized.target.kind == BYTES and result.report.bytes_after > plan.sized.target.amount:
        reason = f"the files do not hold {plan.sized.dtype} alone, or hold some weights twice; "
        warn(
            f"the weights have {result.report.bytes_after / 1e6:,.1f} MB, which is above --to {plan.sized.target.text}: "
            f"{'' if plan.file_bytes else reason}ask for a smaller size"
        )
    return result


def apply_file(
    plan: PruningPlan | Path,
    model: Model | None = None,
    output: str | os.PathLike[str] | None = None,
    cut_options: CutOptions = CUT_DEFAULTS,
    recovery_options: RecoveryOptions = NO_RECOVERY,
    *,
    revision: str | None = None,
    atlas: Atlas | str | os.PathLike[str] | None = None,
) -> Result:
    """Cut a model as a plan or a plan file says, and refit it from the plan's atlas if asked.

    Args:
        plan: A plan, or its file.
        model, output, revision: As for `apply`.
        cut_options: How the result is written and checked.
        recovery_options: How the kept channels are refitted.
        atlas: The plan's atlas, open or by name. A recovery needs it, and the result gets a copy.

    Raises:
        UsageError: As `apply`; or the plan file cannot be read, or a recovery is asked for without ``atlas``.
        AtlasError, ModelError, CheckError, ChanfmtError: As `prune`.
    """
    recovery_options.check()
    given = load_plan(plan) if isinstance(plan, Path) else plan
    if recovery_options.recover != "none" and atlas is None:
        raise UsageError(
            f"--recover {recovery_options.recover} needs the atlas that the plan was made from",
            hint="add --atlas FILE (in Python: atlas=...)",
        )
    with contextlib.ExitStack() as stack:
        source = None if atlas is None else stack.enter_context(opened(atlas))
        recovery = None
        if source is not None:
            given.check_atlas(source)
            recovery = _planned(recovery_options, source, given)
        return apply(given, model, output, cut_options, revision=revision, atlas=source, recovery=recovery)


def apply(
    plan: PruningPlan,
    model: Model | None = None,
    output: str | os.PathLike[str] | None = None,
    options: CutOptions = CUT_DEFAULTS,
    *,
    revision: str | None = None,
    atlas: Atlas | None = None,
    recovery: Recovery | None = None,
) -> Result:
    """Cut a model as ``plan`` says and publish the smaller model as a directory, whole or not at all.

    Args:
        plan: Which channels stay.
        model: The plan's model, or with ``options.fine_tune`` a fine-tune of it: its files, a Hub id, a directory or a
            ``.gguf`` file. None for the model that the plan names, from the Hub, at the commit that was measured.
        output: Directory to write; None for `surgery.result.names.default_name` in the current directory.
        options: How the result is written and checked.
        revision: Branch, tag or commit on the Hub, in place of the measured one.
        atlas: The plan's atlas, open until this returns. The result gets a copy of it.
        recovery: How the kept channels are refitted, from `surgery.recovery.options.plan_recovery`; None for not at all.

    Returns:
        The result, with the record of what was removed, written and checked.

    Raises:
        UsageError: ``output`` cannot be written, the plan names no model that can be found, or the file would hardly shrink.
        AtlasError: ``atlas`` is not the plan's, or changed on disk.
        ModelError: The model cannot be found or fetched, is not the plan's model, or stock code could not load the result.
        CheckError: The result did not pass its checks.
        ChanfmtError: The disk is full or fails.
    """
    options.check()
    check_processes(recovery)
    plan = dataclasses.replace(plan, format=options.format)
    if options.format == GGUF and needs_code(options.layout or plan.layout):
        raise uneven_gguf(uniform=plan.allocation == "uniform")
    directory = output_path(output or default_name(plan))
    if options.format == GGUF:
        check_gguf_output(directory)
        check_biases_of(plan, recovery)
    # Check the output before a download.
    check_output(directory, overwrite=options.overwrite)
    # The plan may know before a download that the file would hardly shrink.
    if options.layout in (None, UNIFORM) and not options.allow_padding:
        _check_size(plan if options.layout is None else dataclasses.replace(plan, layout=UNIFORM))
    source = find_model(plan.model, model, revision)
    say(f"cutting {source.id}")
    if source.revision and (source.source, source.id) == (plan.model.source, plan.model.id):
        plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, revision=source.revision))
    with claimed(directory) if rank() == 0 else contextlib.nullcontext():
        report = apply_plan(plan, source, directory, options, atlas=atlas, recovery=recovery)
    say(f"wrote {directory}")
    if report.source_file and report.gguf is None:
        ways = "add --format gguf for a GGUF file" + ("" if options.dtype else "; --dtype bfloat16 halves its size")
        size = f"{report.bytes_after / 1e6:,.0f} MB in {options.dtype or 'float32'}"
        say(f"{source.id} is {report.source_file}, and the result is not quantised: {size}; {ways}")
    return Result(directory, report, None)


def _planned(options: RecoveryOptions, atlas: Atlas, plan: PruningPlan) -> Recovery | None:
    """`plan_recovery`, with a check of its device: a device that is not there should show before a model is downloaded."""
    recovery = plan_recovery(options, atlas, plan)
    if isinstance(recovery, Refit):
        pick_device(recovery.device, "--recover-device")
    return recovery


def _check_size(plan: PruningPlan) -> None:
    """Raise `UsageError` if the atlas alone tells that the file would hardly shrink.

    For a model type that transformers does not know, the cut gives a better reason for which it refuses.
    """
    import transformers

    if plan.model.model_type in transformers.CONFIG_MAPPING:
        check_plan(plan)
