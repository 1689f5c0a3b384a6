"""A plan and a checkpoint give a smaller checkpoint, tensor by tensor; published whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from chanfmt.base.command_line import names_directory, tells_directories
from chanfmt.base.errors import ModelError, UsageError
from chanfmt.base.files import atomic_directory, check_space, check_target
from chanfmt.base.narrate import progress_bar, say
from chanfmt.base.version import __version__
from chanfmt.format.reader import Atlas
from chanfmt.models.load import auto_class
from chanfmt.models.safetensors import PICKLED_SUFFIXES, CheckpointIndex
from chanfmt.models.source import TEMPLATE_DIRECTORY, ModelSource
from surgery.cut.check import LogitCheck, available_memory, check_logits, check_shapes, memory_shortage
from surgery.cut.checkpoint.reader import read_ahead
from surgery.cut.checkpoint.writer import output_bytes, write_checkpoint
from surgery.cut.config_width import find_layout
from surgery.cut.source import check_fingerprint
from surgery.cut.stock import parse_config
from surgery.planning.plan import Applied, PruningPlan, write_plan
from surgery.result.base import NOTICE_FILE, Base, read_base
from surgery.result.card import model_card
from surgery.result.manifest import hash_files, list_files
from surgery.result.names import ATLAS_FILE, CARD_FILE, EVALUATION_FILE, KEPT_FILE, PICTURE_FILE, REPORT_FILE
from surgery.result.picture import layer_picture
from surgery.result.record import Report

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from surgery.cut.checkpoint.cuts import Cut
    from surgery.recovery.options import BiasRecovery, Refit

_MAX_CONFIG = 16 << 20
_MAX_CARRIED = 128 << 20
_NOT_CARRIED_SUFFIXES = (
    *PICKLED_SUFFIXES,
    ".safetensors",
    ".gguf",
    ".ggml",
    ".onnx",
    ".onnx_data",
    ".h5",
    ".hdf5",
    ".msgpack",
    ".ot",
    ".tflite",
    ".mlmodel",
    ".pb",
    ".npz",
    ".npy",
    ".index.json",
    ".py",
)
_NOT_CARRIED = ("config.json", CARD_FILE, "adapter_config.json", REPORT_FILE, PICTURE_FILE, EVALUATION_FILE)
_PATH_FIELDS = ("_name_or_path", "name_or_path")


def apply_plan(
    plan: PruningPlan,
    directory: Path,
    output: Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    fine_tune: ModelSource | None = None,
    shard_bytes: int | None = None,
    recovery: Refit | BiasRecovery | None = None,
    atlas: Path | None = None,
    command: str = "",
) -> Report:
    """Cut the checkpoint in ``directory`` as ``plan`` says and publish the result as ``output``.

    Args:
        overwrite: Replace ``output`` where it is an earlier result.
        verify: Also compare logits with the masked dense model's.
        fine_tune: What ``directory`` is, where its weights are others than the plan's model's and its FFNs have the
            tensors that the plan names.
        shard_bytes: Largest size of a shard; None for shards that correspond to the source's.
        recovery: How to refit what was kept; None not to.
        atlas: The plan's atlas, of which the result gets a copy.
        command: Command line to record.

    Raises:
        UsageError: ``output`` cannot be written, or may not be replaced.
        ModelError: ``directory`` is not the plan's model, or stock code could not load the result.
        CheckError: The result did not pass its checks.
        ChanfmtError: The disk is full or fails.
    """
    check_output(output, overwrite=overwrite, source=directory)
    model = ModelSource(directory)
    index = model.index
    read_ahead(index.files, available_memory() // 4)
    config = read_config(directory)
    found = model.fingerprint
    if fine_tune is not None:
        _check_kind(plan, directory, config)
    else:
        check_fingerprint(plan.model, directory, found, "; where this is a fine-tune of it, add --fine-tune")
    base = read_base(fine_tune or plan.model, directory)
    layout = find_layout(plan, config, index)
    applied = Applied(layout.widths, layout.fields, found)
    source = index
    with contextlib.ExitStack() as stack:
        recovered = None
        if recovery is not None:
            from surgery.recovery.run import prepared

            recovered = stack.enter_context(prepared(recovery, plan, layout, model, output.absolute().parent))
            plan, layout, index = recovered.plan, recovered.layout, recovered.index
        temporary = stack.enter_context(published(output, index, layout.cuts, layout.config, shard_bytes))
        write_plan(plan, temporary / KEPT_FILE, applied)
        shapes = check_shapes(index, layout.cuts, layout.allowed, temporary)
        logits, skipped = _verify(plan, index, temporary, verify)
        written = CheckpointIndex.open(temporary)
        refitted = recovered.put_in(written, verify=logits is not None) if recovered is not None else None
        (temporary / PICTURE_FILE).write_text(layer_picture(plan), encoding="utf-8")
        _write_notice(base, temporary)
        if atlas is not None:
            _carry_atlas(atlas, temporary / ATLAS_FILE)
        report = Report(
            plan,
            base,
            applied,
            source.parameters,
            written.parameters,
            source.nbytes,
            written.nbytes,
            shapes,
            logits,
            skipped,
            versions(),
            command,
            auto_class(parse_config(layout.config)).__name__,
            hash_files(temporary, list_files(temporary)),
            refitted,
            layout.switched,
        )
        write_json(report.to_json(), temporary / REPORT_FILE)
        (temporary / CARD_FILE).write_text(model_card(report, output.absolute().name), encoding="utf-8")
    return report


def _check_kind(plan: PruningPlan, directory: Path, config: dict[str, Any]) -> None:
    if config.get("model_type") != plan.model.model_type:
        raise ModelError(
            f"{directory} is a {config.get('model_type')!r} model, and the plan is for a "
            f"{plan.model.model_type!r} model: no fine-tune of it"
        )


def check_output(output: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Refuse, before any work, an output directory that cannot be written or may not be replaced.

    Raises:
        UsageError: See `chanfmt.base.files.check_target`; or ``output`` holds ``source``, or was not
            written by this command.
    """
    check_target(output, overwrite=overwrite, directory=True)
    place = output.resolve()
    if source is not None and (place == source.resolve() or place in source.resolve().parents):
        raise UsageError(f"the output {output} would replace the model it is made from", hint="choose another -o")
    if output.is_dir() and any(output.iterdir()) and not (output / REPORT_FILE).is_file():
        raise UsageError(
            f"{output} was not written by surgery: it has no {REPORT_FILE}",
            hint="remove it yourself, or choose another -o",
        )


def _verify(plan: PruningPlan, index: CheckpointIndex, output: Path, verify: bool) -> tuple[LogitCheck | None, str]:
    skipped = "--no-verify" if not verify else memory_shortage(index.parameters)
    if skipped is None:
        return check_logits(plan, index.directory, output), ""
    say(f"logits are not compared with the masked dense model's: {skipped}")
    return None, skipped


def read_config(directory: Path) -> dict[str, Any]:
    """Content of the model's ``config.json``. Raises `ModelError` where it is none, or quantised."""
    path = directory / "config.json"
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise ModelError(f"{path} is larger than {_MAX_CONFIG >> 20} MB")
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a table of fields")
    if config.get("quantization_config"):
        raise ModelError(f"{directory} is quantised, and its scales do not survive a cut", hint="dequantise it first")
    return config


@contextlib.contextmanager
def published(
    output: Path, index: CheckpointIndex, cuts: Mapping[str, Cut], config: dict[str, Any], shard_bytes: int | None
) -> Iterator[Path]:
    """A directory with ``index`` after ``cuts``, ``config`` and what is carried over; ``output`` when the context ends well.

    Raises:
        ChanfmtError: The disk is full or fails.
    """
    carried = list(_carried_files(index.directory))
    total = output_bytes(index, cuts)
    check_space(output.absolute().parent, total + sum(path.stat().st_size for path in carried) + (16 << 20))
    with atomic_directory(output) as temporary:
        with progress_bar(total, "B", "writing") as bar:
            write_checkpoint(index, cuts, temporary, bar.update, shard_bytes)
        # transformers' own configs may hold numbers that JSON has no name for.
        write_json(_without_paths(config), temporary / "config.json", allow_nan=True)
        for path in carried:
            target = temporary / path.relative_to(index.directory)
            target.parent.mkdir(exist_ok=True)
            _carry(path, target)
        yield temporary


def _carry(path: Path, target: Path) -> None:
    """Copy a file, but for the directory of a machine that a tokenizer's table may say it was loaded from."""
    if path.name.endswith("_config.json"):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            value = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(value, dict) and (clean := _without_paths(value)) != value:
                write_json(clean, target, allow_nan=True)
                return
    shutil.copyfile(path, target)


def _without_paths(value: dict[str, Any]) -> dict[str, Any]:
    return {
        name: item
        for name, item in value.items()
        if not (name in _PATH_FIELDS and isinstance(item, str) and names_directory(item))
    }


def _write_notice(base: Base, output: Path) -> None:
    """The notice that the base's licence asks for, where the base has brought none."""
    if base.terms and not any(name.upper().startswith(NOTICE_FILE) for name in os.listdir(output)):
        (output / NOTICE_FILE).write_text(base.terms.notice + "\n", encoding="utf-8")


def _carry_atlas(atlas: Path, target: Path) -> None:
    with Atlas.open(atlas) as opened:
        if any(map(tells_directories, opened.producer.commands())):
            say(f"the result gets no copy of {atlas}: its record of how it was built names directories of a machine")
            return
    shutil.copyfile(atlas, target)


def write_json(value: dict[str, Any], path: Path, *, allow_nan: bool = False) -> None:
    """Write ``value`` for people to read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n", encoding="utf-8")


def _carried_files(directory: Path) -> Iterator[Path]:
    """Tokenizer, generation, template and licence files: whatever is small, visible and no weights or code."""
    home = directory.resolve()
    templates = directory / TEMPLATE_DIRECTORY
    # The Hub cache keeps a snapshot's files as links into the repository's blobs.
    allowed = (home, home / TEMPLATE_DIRECTORY, home.parent.parent / "blobs")
    for path in sorted([*directory.iterdir(), *(templates.glob("*.jinja") if templates.is_dir() else ())]):
        name = path.relative_to(directory).as_posix()
        if not path.is_file() or path.name.startswith(".") or name in _NOT_CARRIED or name.endswith(_NOT_CARRIED_SUFFIXES):
            continue
        if path.resolve().parent not in allowed:
            say(f"{name} is not carried over: it is a link out of the model's directory")
        elif path.stat().st_size > _MAX_CARRIED:
            say(f"{name} is not carried over: it is larger than {_MAX_CARRIED >> 20} MB")
        else:
            yield path


def versions() -> dict[str, str]:
    """Versions of what made the result."""
    packages = ("torch", "transformers", "safetensors", "numpy")
    return {"chanfmt": __version__, "python": platform.python_version()} | {name: version(name) for name in packages}
