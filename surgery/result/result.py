"""A finished result of `surgery prune` or `apply`, read back from its directory."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import CheckError, UsageError
from chanfmt.base.narrate import progress_bar
from chanfmt.base.typed import typed
from surgery.cut.check import LogitCheck, ShapeCheck
from surgery.planning.file import load_applied
from surgery.planning.plan import Change
from surgery.recovery.options import LayerRecovery, RecoveryReport
from surgery.result.base import Base
from surgery.result.evaluated import Evaluated, load_evaluated
from surgery.result.manifest import FileRecord, hash_files, list_files
from surgery.result.names import CARD_FILE, EVALUATION_FILE, KEPT_FILE, REPORT_FILE
from surgery.result.record import REPORT_FORMAT, Report

if TYPE_CHECKING:
    from pathlib import Path

_MAX_REPORT = 64 << 20
_OWN = (REPORT_FILE, CARD_FILE, EVALUATION_FILE)


@dataclass(frozen=True)
class Result:
    """A result's directory and what it says of itself.

    Attributes:
        directory: Where it is.
        report: Content of ``surgery.json``.
        evaluated: What was measured of it; None where nothing was.
    """

    directory: Path
    report: Report
    evaluated: Evaluated | None

    @property
    def names(self) -> list[str]:
        """The files that belong to it, as paths below its directory."""
        return sorted({*self.report.files, *(name for name in _OWN if (self.directory / name).is_file())})

    @property
    def strangers(self) -> list[str]:
        """Files in its directory that do not."""
        return sorted(set(list_files(self.directory)).difference(self.names))


def open_result(directory: Path) -> Result:
    """Read what the result in ``directory`` says of itself. Nothing in it is trusted.

    Raises:
        UsageError: There is none, or its record is damaged or of another kind.
    """
    path = directory / REPORT_FILE
    try:
        if path.stat().st_size > _MAX_REPORT:
            raise UsageError(f"{path} is larger than {_MAX_REPORT >> 20} MB")
        value = typed(json.loads(path.read_text(encoding="utf-8")), dict, REPORT_FILE)
        if value.get("format") != REPORT_FORMAT:
            raise UsageError(f"{directory} is no result of surgery prune or apply: {path.name} says {value.get('format')!r}")
        report = _parse(value, directory)
    except FileNotFoundError:
        raise UsageError(
            f"{directory} is no result of surgery: it has no {REPORT_FILE}",
            hint="make one with: surgery prune ATLAS --sparsity S -o DIR",
        ) from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: {error}", hint="cut the model again") from None
    evaluation = directory / EVALUATION_FILE
    return Result(directory, report, load_evaluated(evaluation) if evaluation.is_file() else None)


def check_unchanged(result: Result) -> None:
    """Compare every file with what it was when the result had passed its checks.

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


def _parse(value: dict[str, Any], directory: Path) -> Report:
    plan, applied = load_applied(directory / KEPT_FILE)
    checks, recovery = value["checks"], value["recovery"]
    skipped = checks["logits"].get("skipped", "")
    files = {
        name: FileRecord(typed(item["bytes"], int, "bytes"), typed(item["sha256"], str, "sha256"))
        for name, item in typed(value["files"], dict, "files").items()
    }
    if any(_leaves(name) for name in files):
        raise ValueError("a file's name leads out of its directory")
    return Report(
        plan=plan,
        base=Base(**{field.name: typed(value["base"][field.name], str, field.name) for field in fields(Base)}),
        applied=applied,
        parameters_before=typed(value["parameters"]["before"], int, "parameters"),
        parameters_after=typed(value["parameters"]["after"], int, "parameters"),
        bytes_before=typed(value["bytes"]["before"], int, "bytes"),
        bytes_after=typed(value["bytes"]["after"], int, "bytes"),
        shapes=ShapeCheck(**checks["shapes"]),
        logits=None if skipped else LogitCheck(**checks["logits"]),
        logits_skipped=typed(skipped, str, "skipped"),
        versions={str(name): typed(text, str, "versions") for name, text in value["versions"].items()},
        command=typed(value["command"], str, "command"),
        loader=typed(value["loader"], str, "loader"),
        files=files,
        recovery=None
        if recovery is None
        else RecoveryReport(
            typed(recovery["method"], str, "method"),
            typed(recovery["tokens"], int, "tokens"),
            [LayerRecovery(**layer) for layer in recovery["layers"]],
            recovery["logit_error"],
        ),
        switched={
            name: Change(item["before"], item["after"])
            for name, item in value["config_fields"].items()
            if name not in applied.config
        },
    )


def _leaves(name: str) -> bool:
    return name.startswith("/") or "\\" in name or bool({"", ".", ".."} & set(name.split("/")))
