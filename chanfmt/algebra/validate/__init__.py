"""Check a file against the specification, level by level (spec section "Validation").

A hostile file may crash the HDF5 library: `chanfmt.algebra.validate.contained` checks the file in a separate
process.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from chanfmt.algebra.validate.findings import ERROR, Finding, Report
from chanfmt.algebra.validate.references import check_references
from chanfmt.algebra.validate.seals import check_digests
from chanfmt.algebra.validate.structure import check_structure
from chanfmt.algebra.validate.values import check_values
from chanfmt.base.errors import AtlasError, UsageError
from chanfmt.format.container import open_container
from chanfmt.format.read_errors import UnreadableError

if TYPE_CHECKING:
    import os

    from chanfmt.format.container import Container

__all__ = ["Finding", "validate"]

LEVELS = (check_structure, check_references, check_values, check_digests)


def validate(path: str | os.PathLike[str]) -> list[Finding]:
    """Check ``path`` against the specification. The file is valid if no finding has the severity ``error``.

    A level is checked only if the levels below it found no error.

    Raises:
        UsageError: The file does not exist, or it cannot be opened at all.
    """
    report = Report()
    try:
        container = open_container(Path(path))
    except AtlasError as error:
        if not error.code:
            raise UsageError(error.message, hint=error.hint) from None
        report.add(error.code, error.where, error.message.removeprefix(f"{path}: "))
        return report.findings
    try:
        _check(container, report)
    finally:
        container.close()
    return sorted(report.findings, key=lambda finding: (finding.rule.severity != ERROR, finding.code, finding.path))


def _check(container: Container, report: Report) -> None:
    try:
        container.check_contents()
        for level in LEVELS:
            level(container, report)
            if report.failed:
                return
    except UnreadableError as error:
        raise UsageError(f"{container.path}: {error.message}", hint=error.hint) from None
    except AtlasError as error:
        report.add(error.code or "E014", error.where, error.message.removeprefix(f"{container.path}: "))
