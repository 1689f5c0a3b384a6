"""A finished result of `surgery prune` or `surgery apply`, read back from its directory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from msgspec import Raw, Struct, to_builtins

from chanfmt.base import html
from chanfmt.base.errors import CheckError, UsageError
from chanfmt.base.inputs import file_size
from chanfmt.base.narrate import progress_bar
from chanfmt.base.parsed import parse_json
from chanfmt.base.text import one_line
from chanfmt.models.source import ModelSource, local_source
from surgery.cut.check import LogitCheck, ShapeCheck
from surgery.cut.extra_layers import ExtraLayers
from surgery.cut.gguf.record import GgufRecord
from surgery.cut.options import EXTRA_LAYERS
from surgery.planning.file import load_applied
from surgery.planning.layouts import needs_code
from surgery.planning.plan import Change  # noqa: TC001 (msgspec reads the annotations)
from surgery.planning.sizes import parameters_text
from surgery.recovery.options import (
    RECOVERIES,
    STARTS,
    Distillation,
    LayerRecovery,
    RecoveryReport,
    SourceDivergence,
    SourceError,
)
from surgery.result.base import Base  # noqa: TC001
from surgery.result.evaluated import Evaluated, load_evaluated
from surgery.result.manifest import FileRecord, hash_files, list_files
from surgery.result.names import CARD_FILE, EVALUATION_FILE, KEPT_FILE, MAX_REPORT, REPORT_FILE
from surgery.result.record import REPORT_FORMAT, Report, summary_rows
from surgery.result.verdict import Verdict  # noqa: TC001

if TYPE_CHECKING:
    from pathlib import Path

_MAKE_ONE = "make one with: surgery prune ATLAS --sparsity S -o DIR"
_OWN = (REPORT_FILE, CARD_FILE, EVALUATION_FILE)


class _Format(Struct):
    """The first question about a ``surgery.json``: which kind it is."""

    format: str = ""


class _BeforeAfter(Struct):
    before: int
    after: int


class _Shapes(Struct, forbid_unknown_fields=True):
    """As `ShapeCheck`."""

    tensors: int
    parameters: int


class _Logits(Struct, forbid_unknown_fields=True):
    """As `LogitCheck`."""

    relative_error: float
    tolerance: float
    count: int
    text: str
    dtype: str


class _AnySkipped(Struct):
    """The reason for which logits were not compared; empty if they were, and then the object is a `_Logits`."""

    skipped: str = ""


class _Checks(Struct):
    shapes: _Shapes
    logits: Raw


class _SourceError(Struct, forbid_unknown_fields=True):
    """As `SourceError`."""

    source: str
    fitted: float | None
    held_out: float | None


class _Layer(Struct, forbid_unknown_fields=True):
    """As `LayerRecovery`."""

    layer_index: int
    module: str
    error_before: float
    error_after: float
    condition: float | None
    damping: float
    held_out: float | None = None
    held_out_lstsq: float | None = None
    epoch: int | None = None
    sources: tuple[_SourceError, ...] = ()
    expert_tokens: tuple[int, ...] = ()
    few_tokens: tuple[int, ...] = ()


class _SourceDivergence(Struct, forbid_unknown_fields=True):
    """As `SourceDivergence`."""

    source: str
    fitted_before: float | None
    fitted_after: float | None
    held_out_before: float | None
    held_out_after: float | None


class _Distillation(Struct, forbid_unknown_fields=True):
    """As `Distillation`."""

    start: str
    steps: int
    step: int
    fitted_before: float | None
    fitted_after: float | None
    held_out_before: float | None
    held_out_after: float | None
    sources: tuple[_SourceDivergence, ...] = ()
    history: tuple[tuple[int, float | None], ...] = ()


class _Recovery(Struct):
    """As `RecoveryReport`."""

    method: str
    tokens: int
    layers: list[_Layer]
    logit_error: float | None
    distillation: _Distillation | None = None


class _ExtraLayers(Struct):
    """As `surgery.cut.extra_layers.ExtraLayers`."""

    choice: str
    layers: tuple[str, ...]
    tensors: int


class _Gguf(Struct, forbid_unknown_fields=True):
    """As `GgufRecord`."""

    file: str
    quant: str | None
    types: dict[str, int]
    copied: int
    weight_error: float
    logit_error: float | None
    divergence: float | None
    skipped: str
    notes: tuple[str, ...]
    cut_quant: str | None = None
    converted: bool = False


class _StoredReport(Struct):
    """The parts of ``surgery.json`` that the plan does not hold."""

    base: Base
    parameters: _BeforeAfter
    bytes: _BeforeAfter
    config_fields: dict[str, Change]
    checks: _Checks
    recovery: _Recovery | None
    versions: dict[str, str]
    command: str
    loader: str
    files: dict[str, FileRecord]
    extra_layers: _ExtraLayers | None = None
    dtype: str | None = None
    source_file: str = ""
    verdict: Verdict | None = None
    gguf: _Gguf | None = None


@dataclass(frozen=True, repr=False)
class Result:
    """A finished result: its directory, and the records in it.

    Attributes:
        directory: The directory of the result.
        report: Content of ``surgery.json``.
        evaluated: Content of ``evaluation.json``; None if nothing was measured.
    """

    directory: Path
    report: Report
    evaluated: Evaluated | None

    def __repr__(self) -> str:
        return f"<Result in {str(self.directory)!r}: {one_line(self.report.base.id)}, {parameters_text(*self.report.sizes.parameters)}>"

    def __fspath__(self) -> str:
        """The directory, so that a result can take the place of a path."""
        return str(self.directory)

    def _repr_html_(self) -> str:
        return html.table((), [*summary_rows(self.report.plan, self.report), ["directory", str(self.directory)]])

    @property
    def names(self) -> list[str]:
        """The files that belong to the result, as paths below its directory."""
        return sorted({*self.report.files, *(name for name in _OWN if (self.directory / name).is_file())})

    @property
    def strangers(self) -> list[str]:
        """Files in the directory that do not belong to the result."""
        return sorted(set(list_files(self.directory)).difference(self.names))


def written_model(result: Result) -> ModelSource:
    """The model of ``result``: its checkpoint, or its GGUF file, which is dequantised into the cache on first use.

    Raises:
        ModelError: The file cannot be read.
    """
    gguf = result.report.gguf
    found = ModelSource(result.directory) if gguf is None else local_source(str(result.directory / gguf.file))
    assert found is not None
    return found


def open_result(directory: Path) -> Result:
    """Read the records of the result in ``directory``. Nothing in them is trusted.

    Raises:
        UsageError: There is no result, or its record is damaged or of another kind.
    """
    path = directory / REPORT_FILE
    if not directory.exists():
        raise UsageError(f"the directory {directory} does not exist", hint=_MAKE_ONE)
    if not directory.is_dir():
        raise UsageError(
            f"{directory} is a file, not the directory of a result",
            hint="publish an atlas with: atlas push FILE REPO" if directory.suffix == ".h5" else _MAKE_ONE,
        )
    try:
        if file_size(path) > MAX_REPORT:
            raise UsageError(f"{path} is larger than {MAX_REPORT >> 20} MB")
        text = path.read_bytes()
        kind = parse_json(text, _Format).format
        if kind != REPORT_FORMAT:
            raise UsageError(f"{directory} is not a result of surgery prune or apply: {path.name} says {kind!r:.60}")
        report = _report(parse_json(text, _StoredReport), directory)
    except FileNotFoundError:
        raise UsageError(
            f"{directory} is not a result of surgery: it has no {REPORT_FILE}",
            hint=_MAKE_ONE,
        ) from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}", hint="cut the model again") from None
    evaluation = directory / EVALUATION_FILE
    return Result(directory, report, load_evaluated(evaluation) if evaluation.is_file() else None)


def check_unchanged(result: Result) -> None:
    """Compare the size and SHA-256 of every file with those at the time of the checks.

    Raises:
        CheckError: A file is missing, or has changed.
    """
    hint = "cut the model again, or put the file back"
    expected = result.report.files
    missing = [name for name in expected if not (result.directory / name).is_file()]
    if missing:
        raise CheckError(f"{result.directory} is not complete: {missing[0]} is missing", hint=hint)
    total = sum(record.bytes for record in expected.values())
    with progress_bar(total, "B", "checking") as bar:
        try:
            found = hash_files(result.directory, expected, bar.update)
        except OSError as error:
            raise CheckError(f"cannot read {error.filename}: {error.strerror}") from None
    changed = [name for name, record in expected.items() if found[name] != record]
    if changed:
        raise CheckError(f"{result.directory / changed[0]} has changed since the result was checked", hint=hint)


def _report(stored: _StoredReport, directory: Path) -> Report:
    plan, applied = load_applied(directory / KEPT_FILE)
    # Which programs read the result depends on fields that the cut does not change.
    plan = replace(plan, model_config=ModelSource(directory).config_fields) if needs_code(plan.layout) else plan
    if any(_leaves(name) for name in stored.files):
        raise ValueError("a file's name leads out of its directory")
    skipped = parse_json(stored.checks.logits, _AnySkipped).skipped
    logits = None if skipped else parse_json(stored.checks.logits, _Logits)
    recovery = stored.recovery
    if recovery is not None and recovery.method not in RECOVERIES:
        raise ValueError(f"its recovery {recovery.method!r:.60} is unknown")
    if stored.parameters.before < 1:
        raise ValueError("its model had no parameters")
    return Report(
        plan=plan,
        base=stored.base,
        applied=applied,
        parameters_before=stored.parameters.before,
        parameters_after=stored.parameters.after,
        bytes_before=stored.bytes.before,
        bytes_after=stored.bytes.after,
        shapes=ShapeCheck(**to_builtins(stored.checks.shapes)),
        logits=None if logits is None else LogitCheck(**to_builtins(logits)),
        logits_skipped=skipped,
        versions=stored.versions,
        command=stored.command,
        loader=stored.loader,
        files=stored.files,
        recovery=None
        if recovery is None
        else RecoveryReport(
            recovery.method,
            recovery.tokens,
            [_layer(layer) for layer in recovery.layers],
            recovery.logit_error,
            None if recovery.distillation is None else _distillation(recovery.distillation),
        ),
        switched={name: change for name, change in stored.config_fields.items() if name not in applied.config},
        extra_layers=None if stored.extra_layers is None else _extra_layers(stored.extra_layers),
        dtype=stored.dtype,
        source_file=stored.source_file,
        verdict=stored.verdict,
        gguf=None if stored.gguf is None else _gguf(stored.gguf),
    )


def _gguf(stored: _Gguf) -> GgufRecord:
    if "/" in stored.file or _leaves(stored.file):
        raise ValueError("the name of its GGUF file leads out of its directory")
    return GgufRecord(**to_builtins(stored) | {"notes": stored.notes})


def _extra_layers(stored: _ExtraLayers) -> ExtraLayers:
    if stored.choice not in EXTRA_LAYERS:
        raise ValueError("extra_layers names an unknown choice")
    return ExtraLayers(stored.choice, stored.layers, stored.tensors)


def _layer(stored: _Layer) -> LayerRecovery:
    fields = to_builtins(stored)
    return LayerRecovery(**fields | {"sources": tuple(SourceError(**item) for item in fields["sources"])})


def _distillation(stored: _Distillation) -> Distillation:
    if stored.start not in STARTS:
        raise ValueError(f"its distillation starts from {stored.start!r:.60}, which is unknown")
    fields = to_builtins(stored)
    sources = tuple(SourceDivergence(**item) for item in fields["sources"])
    return Distillation(**fields | {"sources": sources, "history": stored.history})


def _leaves(name: str) -> bool:
    return name.startswith("/") or "\\" in name or bool({"", ".", ".."} & set(name.split("/")))
