"""A plan and a checkpoint give a smaller checkpoint, tensor by tensor; published whole or not at all."""

from __future__ import annotations

import json
import platform
import shutil
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from chanfmt import __version__
from chanfmt.console import progress_bar
from chanfmt.errors import ModelError, UsageError
from chanfmt.files import atomic_directory, check_space, check_target
from chanfmt.models.checkpoint import PICKLED_SUFFIXES, CheckpointIndex, fingerprint
from surgery.card import model_card
from surgery.check import LogitCheck, check_logits, check_shapes, memory_shortage
from surgery.checkpoint.cuts import plan_cuts
from surgery.checkpoint.writer import output_bytes, write_checkpoint
from surgery.config_width import narrow_config, wanted_shapes
from surgery.plan import PruningPlan, write_plan
from surgery.report import Report
from surgery.stock import meta_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

REPORT_FILE = "surgery.json"
KEPT_FILE = "kept_channels.safetensors"

_MAX_CONFIG = 16 << 20
_MAX_CARRIED = 128 << 20
_NOT_CARRIED_SUFFIXES = (
    *PICKLED_SUFFIXES, ".safetensors", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".hdf5", ".msgpack", ".ot",
    ".tflite", ".mlmodel", ".pb", ".npz", ".npy", ".index.json", ".py",
)
_NOT_CARRIED = ("config.json", "README.md", "adapter_config.json", REPORT_FILE)


def apply_plan(
    plan: PruningPlan,
    directory: Path,
    output: Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    command: str = "",
    progress: bool = False,
    note: Callable[[str], object] = lambda text: None,
) -> Report:
    """Cut the checkpoint in ``directory`` as ``plan`` says and publish the result as ``output``.

    Args:
        overwrite: Replace ``output`` where it is an earlier result.
        verify: Also compare logits with the masked dense model's.
        command: Command line to record.
        progress: Draw a progress bar on stderr where that is a terminal.
        note: Receives a sentence for people.

    Raises:
        UsageError: ``output`` cannot be written, or may not be replaced.
        ModelError: ``directory`` is not the plan's model, or stock code could not load the result.
        CheckError: The result did not pass its checks.
        ChanfmtError: The disk is full or fails.
    """
    check_output(output, overwrite=overwrite, source=directory)
    index = CheckpointIndex.open(directory)
    if fingerprint(index) != plan.model.fingerprint:
        raise ModelError(
            f"{directory} is not the model of the atlas: its weights differ from those of {plan.model.id!r}",
            hint="pass the model that the atlas was built from, or build an atlas of this one",
        )
    config = _read_config(directory)
    cuts = plan_cuts(plan, index)
    before = meta_shapes(config)
    wanted = wanted_shapes(plan, index, cuts, before)
    narrowed, fields = narrow_config(config, before, wanted, plan.widths)
    carried = list(_carried_files(directory, note))
    total = output_bytes(index, cuts)
    check_space(output.absolute().parent, total + sum(path.stat().st_size for path in carried) + (16 << 20))
    with atomic_directory(output) as temporary:
        _write_weights(plan, index, cuts, temporary, total, progress)
        (temporary / "config.json").write_text(
            json.dumps(narrowed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        for path in carried:
            shutil.copyfile(path, temporary / path.name)
        shapes = check_shapes(index, cuts, wanted, temporary)
        logits, skipped = _verify(plan, index, temporary, verify, note)
        written = CheckpointIndex.open(temporary)
        report = Report(
            plan, index.parameters, written.parameters, index.nbytes, written.nbytes, fields, shapes, logits, skipped,
            _versions(), command,
        )
        (temporary / REPORT_FILE).write_text(
            json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
        (temporary / "README.md").write_text(model_card(report, output.absolute().name), encoding="utf-8")
    return report


def check_output(output: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Refuse, before any work, an output directory that cannot be written or may not be replaced.

    Raises:
        UsageError: See `chanfmt.files.check_target`; or ``output`` holds ``source``, or was not
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


def _write_weights(
    plan: PruningPlan, index: CheckpointIndex, cuts: Any, directory: Path, total: int, progress: bool
) -> None:
    with progress_bar(total, "B", "writing", quiet=not progress) as bar:
        write_checkpoint(index, cuts, directory, bar.update)
    write_plan(plan, directory / KEPT_FILE)


def _verify(
    plan: PruningPlan, index: CheckpointIndex, output: Path, verify: bool, note: Callable[[str], object]
) -> tuple[LogitCheck | None, str]:
    skipped = "--no-verify" if not verify else memory_shortage(index.parameters)
    if skipped is None:
        return check_logits(plan, index.directory, output), ""
    note(f"logits are not compared with the masked dense model's: {skipped}")
    return None, skipped


def _read_config(directory: Path) -> dict[str, Any]:
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


def _carried_files(directory: Path, note: Callable[[str], object]) -> Iterator[Path]:
    """Tokenizer, generation, template and licence files: whatever is small, visible and no weights or code."""
    home = directory.resolve()
    # The Hub cache keeps a snapshot's files as links into the repository's blobs.
    allowed = (home, home.parent.parent / "blobs")
    for path in sorted(directory.iterdir()):
        name = path.name
        if not path.is_file() or name.startswith(".") or name in _NOT_CARRIED or name.endswith(_NOT_CARRIED_SUFFIXES):
            continue
        if path.resolve().parent not in allowed:
            note(f"{name} is not carried over: it is a link out of the model's directory")
        elif path.stat().st_size > _MAX_CARRIED:
            note(f"{name} is not carried over: it is larger than {_MAX_CARRIED >> 20} MB")
        else:
            yield path


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "safetensors", "numpy")
    return {"chanfmt": __version__, "python": platform.python_version()} | {name: version(name) for name in packages}
