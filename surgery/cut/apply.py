"""Write a smaller checkpoint from a plan and a checkpoint, tensor by tensor. It is published whole or not at all."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from chanfmt.base.command_line import recorded_command, tells_directories
from chanfmt.base.errors import AtlasError, ModelError, UsageError
from chanfmt.base.files import atomic_directory, check_space, check_target
from chanfmt.base.memory import available_memory
from chanfmt.base.narrate import progress_bar, say
from chanfmt.base.processes import rank
from chanfmt.base.version import __version__
from chanfmt.format.reader import Atlas
from chanfmt.models.accounting import check_accounted
from chanfmt.models.gguf_file import describe
from chanfmt.models.own import code_fields, forget_code, is_own, own_files
from chanfmt.models.source import ModelSource
from surgery.cut.carried import clean_config, find_carried, write_json
from surgery.cut.check import LogitCheck, NotCheckedError, check_logits, check_shapes
from surgery.cut.checkpoint.reader import read_ahead
from surgery.cut.checkpoint.writer import output_bytes, write_checkpoint
from surgery.cut.config_width import check_layout, find_layout, with_layout
from surgery.cut.dtype_field import in_dtype
from surgery.cut.extra_layers import handle_extra_layers, without
from surgery.cut.gguf.imatrix import sliced, write_sliced
from surgery.cut.gguf.result import check_gguf_cut, check_gguf_source, write_result
from surgery.cut.gguf.size import check_biases_of
from surgery.cut.loader import loader_name
from surgery.cut.options import CUT_DEFAULTS, CutOptions
from surgery.cut.relocate import relocated
from surgery.cut.source import check_fingerprint
from surgery.cut.stock import parse_config
from surgery.planning.file import write_plan
from surgery.planning.formats import GGUF, uneven_gguf
from surgery.planning.layouts import needs_code
from surgery.planning.plan import Applied, PruningPlan
from surgery.recovery.leftover import remove_finished
from surgery.recovery.options import Refit
from surgery.recovery.processes import HelpedError, check_processes
from surgery.result.base import NOTICE_FILE, Base, read_base
from surgery.result.card import model_card
from surgery.result.manifest import hash_files, list_files
from surgery.result.names import ATLAS_FILE, CARD_FILE, IMATRIX_FILE, KEPT_FILE, PICTURE_FILE, REPORT_FILE
from surgery.result.picture import layer_picture
from surgery.result.record import Report

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from chanfmt.models.safetensors import CheckpointIndex
    from surgery.cut.checkpoint.cuts import Cut
    from surgery.recovery.options import Recovery


def apply_plan(
    plan: PruningPlan,
    source: ModelSource,
    output: Path,
    options: CutOptions = CUT_DEFAULTS,
    *,
    atlas: Atlas | None = None,
    recovery: Recovery | None = None,
) -> Report:
    """Cut the checkpoint of ``source`` as ``plan`` says and publish the result as the directory ``output``.

    Args:
        source: The plan's model, or with ``options.fine_tune`` a model with other weights in the same tensors.
        atlas: The plan's atlas, open. The result gets a copy of its file.
        recovery: How the kept channels are refitted; None for not at all.

    Raises:
        UsageError: ``output`` cannot be written, or may not be replaced; or the file would hardly shrink.
        AtlasError: ``atlas`` is not the plan's atlas, or its file was replaced after it was opened.
        ModelError: ``source`` is not the plan's model, or stock code could not load the result.
        CheckError: The result did not pass its checks.
        ChanfmtError: The disk is full or fails.
        HelpedError: torchrun started this process beside the first one, which writes the result.
    """
    check_processes(recovery)
    check_output(output, overwrite=options.overwrite, source=source.directory)
    if atlas is not None:
        plan.check_atlas(atlas)
    options.check()
    plan = replace(plan, format=options.format)
    if options.format == GGUF:
        check_gguf_source(source)
        check_biases_of(plan, recovery)
    # A type that stock code does not know is refused for that reason, before anything else about it.
    parse_config(source.config_fields)
    accounting = check_accounted(source)
    config, index = source.config_fields, source.index
    read_ahead(index.files, available_memory() // 4)
    if options.fine_tune:
        _check_kind(plan, source)
    else:
        check_fingerprint(plan.model, source, _for_a_fine_tune(plan, source, by_atlas=atlas is not None))
    plan = relocated(replace(plan, extra=()), index, config)
    plan = with_layout(plan, options.layout or plan.layout, config)
    if options.format == GGUF and needs_code(plan.layout):
        raise uneven_gguf(uniform=plan.allocation == "uniform")
    base = read_base(source if options.fine_tune else plan.model, source.directory)
    layout = find_layout(plan, config, index)
    if not options.allow_padding:
        check_layout(plan, layout, index)
    handled = handle_extra_layers(plan, layout, index, accounting, options.extra_layers)
    plan, layout = handled.plan, in_dtype(handled.layout, options.dtype)
    applied = Applied(layout.widths, layout.fields, source.fingerprint)
    if options.format == GGUF:
        check_gguf_cut(source, plan, layout, options)
    # A matrix of another model is refused before any work.
    matrix = None if options.imatrix is None else sliced(options.imatrix, plan, layout.widths, source.config_fields)
    if options.format == GGUF and source.file is None:
        # The file is made from the cut in float32, so that its numbers are rounded once.
        options = replace(options, dtype="float32")
        layout = in_dtype(layout, options.dtype)
    with contextlib.ExitStack() as stack:
        recovered = None
        if isinstance(recovery, Refit) and rank():
            from surgery.recovery.run import help_recovery

            help_recovery(recovery, plan, source, output, options.dtype)
            raise HelpedError("the first process writes the result")
        if recovery is not None:
            from surgery.recovery.run import prepared

            recovered = stack.enter_context(prepared(recovery, plan, layout, source, output, options.dtype))
            plan, layout, index = recovered.plan, recovered.layout, recovered.index
        index = without(index, handled.dropped)
        temporary = stack.enter_context(published(output, index, layout.cuts, layout.config, options))
        checkpoint = list_files(temporary)
        write_plan(plan, temporary / KEPT_FILE, applied)
        # The check loads our modelling file from the directory, as a user does. It was written just now.
        written = ModelSource(temporary, trust_remote_code=is_own(layout.config))
        if written.trust_remote_code:
            stack.callback(forget_code, temporary)
        shapes = check_shapes(index, layout.cuts, layout.allowed, written, options.dtype)
        logits, skipped = _verify(plan, source, written, options.verify, options.dtype)
        refitted = recovered.put_in(written, verify=logits is not None) if recovered is not None else None
        gguf = None
        sizes = source.index.nbytes, written.index.nbytes
        parameters = written.index.parameters - source.index.parameters
        if options.format == GGUF:
            made = write_result(
                temporary, output.absolute().name, plan, layout, source, written, options, refitted=recovered is not None
            )
            gguf, sizes = made.record, (made.bytes_before, made.bytes_after)
            # The GGUF file holds the weights, the tokenizer and the config.
            _remove(temporary, checkpoint)
        if matrix is not None:
            write_sliced(matrix, temporary / IMATRIX_FILE)
        (temporary / PICTURE_FILE).write_text(layer_picture(plan), encoding="utf-8")
        _write_notice(base, temporary)
        if atlas is not None:
            _carry_atlas(atlas, plan, temporary / ATLAS_FILE)
        # A checkpoint may hold buffers too. The plan counts parameters.
        before = plan.parameters or source.index.parameters
        report = Report(
            plan,
            base,
            applied,
            before,
            before + parameters,
            *sizes,
            shapes,
            logits,
            skipped,
            versions(),
            recorded_command(),
            loader_name(layout.config),
            hash_files(temporary, list_files(temporary)),
            refitted,
            layout.switched,
            handled.record,
            None if gguf is not None else options.dtype,
            "" if source.file is None else describe(source.file),
            layout.set_by,
            gguf=gguf,
        )
        write_json(report.to_json(), temporary / REPORT_FILE)
        (temporary / CARD_FILE).write_text(model_card(report, output.absolute().name), encoding="utf-8")
    return report


def _for_a_fine_tune(plan: PruningPlan, source: ModelSource, *, by_atlas: bool) -> str:
    """A further way out if ``source`` may be a fine-tune of the plan's model; empty if it is a model of another type.

    Args:
        by_atlas: The plan was made on the way, and there is no file of it.
    """
    if source.config_fields.get("model_type") != plan.model.model_type:
        return ""
    first = "make a plan with: surgery plan ATLAS --sparsity S -o PLAN, and then " if by_atlas else ""
    return f"; if this is a fine-tune of it, {first}use: surgery apply PLAN --model MODEL --fine-tune"


def _check_kind(plan: PruningPlan, source: ModelSource) -> None:
    model_type = source.config_fields.get("model_type")
    if model_type != plan.model.model_type:
        raise ModelError(
            f"{source.directory} is a {model_type!r} model, and the plan is for a {plan.model.model_type!r} model, "
            "so it is not a fine-tune of it"
        )


def check_output(output: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Refuse, before any work, an output directory that cannot be written or may not be replaced.

    If the command that wrote the directory was killed before it removed its refit, the refit is removed.

    Raises:
        UsageError: As `chanfmt.base.files.check_target`; or ``output`` contains the model directory ``source``, or holds
            something that is not a result of surgery.
    """
    remove_finished(output)
    check_target(output, overwrite=overwrite, directory=True)
    place = output.resolve()
    if source is not None and (place == source.resolve() or place in source.resolve().parents):
        raise UsageError(f"the output {output} would replace the model that it is made from", hint="choose another -o")
    if output.is_dir() and any(output.iterdir()) and not (output / REPORT_FILE).is_file():
        raise UsageError(
            f"{output} was not written by surgery: it has no {REPORT_FILE}",
            hint="remove the directory yourself, or choose another -o",
        )


def _verify(
    plan: PruningPlan, source: ModelSource, written: ModelSource, verify: bool, dtype: str | None
) -> tuple[LogitCheck | None, str]:
    """The check of all logits, or None and the reason for which it is skipped."""
    skipped = "--no-verify"
    if verify:
        try:
            return check_logits(plan, source, written, rounded=dtype), ""
        except NotCheckedError as error:
            skipped = error.message
    say(f"logits are not compared with the masked dense model's: {skipped}")
    return None, skipped


@contextlib.contextmanager
def published(
    output: Path, index: CheckpointIndex, cuts: Mapping[str, Cut], config: dict[str, Any], options: CutOptions
) -> Iterator[Path]:
    """A temporary directory with ``index`` after ``cuts``, ``config`` and the files that are carried over from the model.

    If the body ends without an error, the directory is published as ``output``; otherwise it is removed.

    Raises:
        ChanfmtError: The disk is full or fails.
    """
    carried = find_carried(index.directory)
    total = output_bytes(index, cuts, options.dtype)
    check_space(output.absolute().parent, total + carried.nbytes + (16 << 20))
    with atomic_directory(output, overwrite=options.overwrite) as temporary:
        with progress_bar(total, "B", "writing") as bar:
            write_checkpoint(index, cuts, temporary, bar.update, options.shard_bytes, options.dtype)
        # transformers' own configs may hold numbers that JSON cannot name.
        write_json(clean_config(config) | code_fields(config), temporary / "config.json", allow_nan=True)
        carried.copy(temporary)
        for name, text in own_files(config).items():
            (temporary / name).write_text(text, encoding="utf-8")
        yield temporary


def _remove(directory: Path, names: list[str]) -> None:
    """Remove the files ``names`` below ``directory``, and directories that are empty then."""
    for name in names:
        path = directory / name
        path.unlink()
        with contextlib.suppress(OSError):
            if path.parent != directory:
                path.parent.rmdir()


def _write_notice(base: Base, output: Path) -> None:
    """Write the notice that the base's licence asks for, unless the base has one of its own."""
    if base.terms and not any(name.upper().startswith(NOTICE_FILE) for name in os.listdir(output)):
        (output / NOTICE_FILE).write_text(base.terms.notice + "\n", encoding="utf-8")


def _carry_atlas(atlas: Atlas, plan: PruningPlan, target: Path) -> None:
    """Copy the file of ``atlas``, unless its history names directories. Raises `AtlasError` if it is another file by now."""
    if any(map(tells_directories, atlas.producer.commands())):
        say(f"the result gets no copy of {atlas.path}: its record of how it was built names directories of a machine")
        return
    shutil.copyfile(atlas.file, target)
    with Atlas.open(target) as copy:
        if copy.content_sha256 != plan.atlas_sha256:
            raise AtlasError(
                f"{atlas.path} changed while the model was cut: its content SHA-256 is {copy.content_sha256[:12]}..., and the "
                f"plan was made from {plan.atlas_sha256[:12]}...; nothing was written",
                hint="run the command again",
            )


def versions() -> dict[str, str]:
    """Versions of the packages that made the result."""
    packages = ("torch", "transformers", "safetensors", "numpy")
    return {"chanfmt": __version__, "python": platform.python_version()} | {name: version(name) for name in packages}
