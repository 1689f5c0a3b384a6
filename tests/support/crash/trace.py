"""Interrupt the system calls of a function with strace."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from chanfmt.base.errors import ChanfmtError
from tests.support.crash.harness import child

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

STRACE = shutil.which("strace")
CALLS = (
    "write",
    "pwrite64",
    "ftruncate",
    "truncate",
    "fallocate",
    "fsync",
    "fdatasync",
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "unlink",
    "unlinkat",
    "mkdir",
    "rmdir",
    "chmod",
    "flock",
)
"""What changes the disk, or who may remove what; startup is long over when they are counted."""
FAILED = 3
"""Exit code of a function that ended with an error of ours."""


def trace(work: Callable[[], object], log: Path, options: Sequence[str]) -> tuple[int, str]:
    """Run ``work`` in a child that strace follows from before its first call. Returns exit code and trace."""
    ready, waiting = os.pipe()

    def run() -> None:
        # If ptrace is restricted to parents, the child allows everybody: PR_SET_PTRACER, PR_SET_PTRACER_ANY.
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
        os.close(waiting)
        os.read(ready, 1)
        try:
            work()
        except ChanfmtError:
            os._exit(FAILED)

    assert STRACE is not None
    pid = child(run)
    os.close(ready)
    strace = subprocess.Popen([STRACE, "-o", str(log), *options, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    line = strace.stderr.readline()
    os.close(waiting) if "attached" not in line else os.write(waiting, b"x")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    strace.stderr.read()
    strace.wait()
    strace.stderr.close()
    if "attached" not in line:
        pytest.skip(f"strace may not follow a process here: {line.strip()}")
    os.close(waiting)
    return code, log.read_text()


def calls_of(log: str) -> list[str]:
    """Names of the calls in a trace of `CALLS`, in order."""
    return re.findall(rf"^({'|'.join(CALLS)})\(", log, re.MULTILINE)
