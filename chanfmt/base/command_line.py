"""The command line as it is recorded in files that travel.

Library code does not read ``sys.argv``, because that may be the command line of a notebook kernel or of another program.
The code that runs a command line calls `recorded`. Otherwise there is nothing to record.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_command: ContextVar[str] = ContextVar("command", default="")


@contextlib.contextmanager
def recorded(program: str, arguments: Sequence[str]) -> Iterator[None]:
    """Let `recorded_command` return this command line in the body."""
    token = _command.set(portable_command(program, arguments))
    try:
        yield
    finally:
        _command.reset(token)


def recorded_command() -> str:
    """The command line that is being run, as `portable_command` writes it; empty if Python code called the library."""
    return _command.get()


def portable_command(program: str, arguments: Sequence[str]) -> str:
    """A command line with the names of files and directories, but not the paths to them.

    A recorded command ends up in atlases, model cards and public repositories. There it must not tell this machine's
    directories or users.
    """
    text = shlex.join([program, *map(_without_directory, arguments)])
    return text.encode("utf-8", "replace").decode("utf-8")


def names_directory(text: str) -> bool:
    """Whether ``text`` is a path below a directory of this machine, as far as we can tell."""
    path = os.path.expanduser(text)
    if "://" in text:
        return False
    # A Hub id has a separator too. An output may not exist yet, but its directory does.
    inside = os.sep in path and (os.path.exists(path) or os.path.isdir(os.path.dirname(path)))
    return os.path.isabs(path) or text.startswith(("~", f".{os.sep}", f"..{os.sep}")) or inside


def tells_directories(command: str) -> bool:
    """Whether a recorded ``command`` names a directory of a machine, which `portable_command` leaves out."""
    # Not by a shell's rules: a path, quoted or joined by "=" or neither, begins after one of these characters.
    return any(names_directory(word) for word in re.split(r"[\s'\"=]+", command))


def _without_directory(argument: str) -> str:
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    if not names_directory(value):
        return argument
    name = os.path.basename(value.rstrip(os.sep))
    return option + equals + (name if name not in ("", "..", "~") else ".")
