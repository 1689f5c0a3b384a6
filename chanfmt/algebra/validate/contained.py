"""Validate in a separate process, so that a file that crashes the HDF5 library crashes only that process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from chanfmt.algebra.validate import validate
from chanfmt.algebra.validate.findings import Finding
from chanfmt.base.errors import UsageError
from chanfmt.format.sandbox import Crashed, run_contained

if TYPE_CHECKING:
    from pathlib import Path

CPU_SECONDS = 60
_RECORD, _FIELD = "\x1e", "\x1f"


def validate_contained(path: Path) -> list[Finding]:
    """Run `chanfmt.algebra.validate.validate` with limits on memory and time. A crash becomes the finding E017.

    Raises:
        UsageError: The file does not exist, or it cannot be opened at all.
    """

    def work() -> str:
        try:
            return _packed("findings", *((item.code, item.path, item.message) for item in validate(path)))
        except UsageError as error:
            return _packed("usage", (error.message, error.hint or ""))

    try:
        kind, *records = run_contained(
            work, size=os.path.getsize(path) if os.path.isfile(path) else 0, cpu_seconds=CPU_SECONDS
        ).split(_RECORD)
    except Crashed as crash:
        return [Finding("E017", "/", f"cannot be read: {crash}")]
    if kind == "usage":
        message, hint = records[0].split(_FIELD)
        raise UsageError(message, hint=hint or None)
    return [Finding(*record.split(_FIELD)) for record in records]


def _packed(kind: str, *records: tuple[str, ...]) -> str:
    return _RECORD.join(
        [kind, *(_FIELD.join(text.replace(_RECORD, " ").replace(_FIELD, " ") for text in record) for record in records)]
    )
