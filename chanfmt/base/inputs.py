"""The files and directories that users name as inputs."""

from __future__ import annotations

import os
from pathlib import Path


def input_path(name: str | os.PathLike[str]) -> Path:
    """The path of the input that a user calls ``name``, with ``~`` expanded.

    Outputs are expanded too. A shell leaves ``~`` as it is inside a word (``--protect=~/a.json``), and in Python and in the
    browser there is no shell.
    """
    return Path(os.path.expanduser(os.fspath(name)))
