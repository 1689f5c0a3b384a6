"""Errors that a user can act on: each says what is wrong, and what to do about it."""

from __future__ import annotations

from chanfmt.base.text import one_line


def first_line(error: BaseException) -> str:
    """Message of another library's exception, cut to one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class ChanfmtError(Exception):
    """A failure that the command line reports in one line and a hint, without a traceback.

    Names of files and texts of files may be part of an error, so it is made of lines as `chanfmt.base.text.one_line` makes
    them.

    Args:
        message: What is wrong, as a sentence without a final full stop.
        hint: What to do next, best as a command.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = one_line(message)
        self.hint = None if hint is None else one_line(hint)
        super().__init__(self.message)

    def add_hint(self, hint: str) -> None:
        """Add a second line to the hint."""
        self.hint = "\n  ".join([*([self.hint] if self.hint else []), one_line(hint)])

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(ChanfmtError):
    """A command cannot be carried out as given: a bad value of an option, a missing file."""

    exit_code = 2


class AtlasError(ChanfmtError):
    """A file is not a readable importance atlas, or not the atlas that is needed.

    Args:
        code: Code of the rule of the specification that the file breaks, such as ``E101``; empty if it breaks none.
        where: Path of the object in the file.
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
    """A result did not pass its own check, and was not published."""


class MissingPackageError(ChanfmtError):
    """A command needs an optional package that is not installed.

    Args:
        package: Name of the package to import.
        extra: The extra of ``chanfmt`` that installs it; empty if the base installation does.
        purpose: What needs it, as the subject of the message.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed",
            hint=f"install it with: pip install {package}" + (f" (it is in chanfmt's extra [{extra}])" if extra else ""),
        )
