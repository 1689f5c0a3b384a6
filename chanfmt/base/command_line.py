"""The command line as it is recorded in files that travel."""

from __future__ import annotations

import os
import re
import shlex
import sys


def recorded_command(program: str) -> str:
    """The command this process runs, with files and directories by their names alone.

    What is recorded ends up in atlases, model cards and public repositories, and says nothing there about
    this machine's directories or users.
    """
    text = shlex.join([program, *(_without_directory(argument) for argument in sys.argv[1:])])
    return text.encode("utf-8", "replace").decode("utf-8")


def names_directory(text: str) -> bool:
    """Whether ``text`` is a path below some directory of a machine, as far as can be told."""
    path = os.path.expanduser(text)
    if "://" in text:
        return False
    # A Hub id has a separator too. An output may not exist yet, but the directory it goes to does.
    inside = os.sep in path and (os.path.exists(path) or os.path.isdir(os.path.dirname(path)))
    return os.path.isabs(path) or text.startswith(("~", f".{os.sep}", f"..{os.sep}")) or inside


def tells_directories(command: str) -> bool:
    """Whether a recorded ``command`` names a directory of a machine, as `recorded_command` does not."""
    # No shell's rules: whatever is quoted, joined by "=" or neither, a path begins after one of these.
    return any(names_directory(word) for word in re.split(r"[\s'\"=]+", command))


def _without_directory(argument: str) -> str:
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    if not names_directory(value):
        return argument
    name = os.path.basename(value.rstrip(os.sep))
    return option + equals + (name if name not in ("", "..", "~") else ".")
