"""Errors a user can act on. Every one carries what is wrong and, where there is one, the way out."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What another library's exception says, in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class ChanfmtError(Exception):
    """A failure that is reported in one line, without a traceback.

    Args:
        message: What is wrong, as a sentence without a final full stop.
        hint: What to do next.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(ChanfmtError):
    """The command cannot mean anything as given: a bad option value, a missing file."""

    exit_code = 2


class AtlasError(ChanfmtError):
    """A file is not a readable importance atlas, or not the right one.

    Args:
        code: The rule of the specification that the file breaks, a key of `chanfmt.algebra.validate.findings.RULES`.
        where: Path of the object at fault.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None, code: str = "", where: str = "/") -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.where = where


class ModelError(ChanfmtError):
    """A model cannot be found, loaded, measured or cut."""

    exit_code = 2


class CheckError(ChanfmtError):
    """A result was produced and did not pass its own check; nothing was published."""


class MissingPackageError(ChanfmtError):
    """An optional dependency is needed for what was asked."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed",
            hint=f"install it with: pip install 'chanfmt[{extra}]'",
        )
