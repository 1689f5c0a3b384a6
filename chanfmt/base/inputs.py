"""The files and directories that users name as inputs."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def input_path(name: str | os.PathLike[str]) -> Path:
    """The path of the input that a user calls ``name``, with ``~`` expanded.

    Outputs are expanded too. A shell leaves ``~`` as it is inside a word (``--protect=~/a.json``), and in Python and in the
    browser there is no shell.
    """
    return Path(os.path.expanduser(os.fspath(name)))


def file_size(path: Path) -> int:
    """Bytes of the file ``path``, which is about to be read whole.

    Raises:
        OSError: It cannot be read, or it is a pipe or a device: reading one might never end.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return status.st_size
