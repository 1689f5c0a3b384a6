"""Every system call of a small write interrupted in turn: the target is the old atlas or the new one, never a third thing."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys

import pytest

from chanfmt.base.errors import ChanfmtError
from chanfmt.format.writer import write_atlas
from tests.support.crash.harness import child, content, same
from tests.support.factory import random_content

STRACE = shutil.which("strace")
CALLS = (
    "write",
    "pwrite64",
    "ftruncate",
    "truncate",
    "fsync",
    "fdatasync",
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "unlink",
    "unlinkat",
    "flock",
)
"""What changes the disk, or who may remove what; startup is long over when they are counted."""
FAILED = 3

pytestmark = pytest.mark.skipif(STRACE is None or sys.platform != "linux", reason="needs strace, which only Linux has")


def traced(path, options):
    """Write new content to ``path`` in a child that strace follows from before its first call. Returns exit code and trace."""
    ready, waiting = os.pipe()

    def work():
        # If ptrace is restricted to parents, the child allows everybody: PR_SET_PTRACER, PR_SET_PTRACER_ANY.
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
        os.close(waiting)
        os.read(ready, 1)
        try:
            write_atlas(NEW, path)
        except ChanfmtError:
            os._exit(FAILED)

    pid = child(work)
    os.close(ready)
    log = path.parent.parent / "trace"
    strace = subprocess.Popen([STRACE, "-o", str(log), *options, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
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


OLD, NEW = (random_content(layers=2, channels=48, seed=seed) for seed in (0, 1))


@pytest.fixture
def place(tmp_path):
    """A directory with the old atlas as ``a.h5``, and functions that put it back and say what is there."""
    directory = tmp_path / "d"
    directory.mkdir()
    path = directory / "a.h5"
    write_atlas(NEW, path)
    new = content(path)
    write_atlas(OLD, path)
    image, old = path.read_bytes(), content(path)

    def reset():
        for item in directory.iterdir():
            item.unlink()
        path.write_bytes(image)

    def there():
        found = content(path)
        assert same(found, old) or same(found, new)
        return "new" if same(found, new) else "old"

    return path, reset, there


def calls_of(trace):
    """Names of the calls in a trace of `CALLS`, in order."""
    return re.findall(rf"^({'|'.join(CALLS)})\(", trace, re.MULTILINE)


def test_killed_at_every_call(place):
    path, reset, there = place
    code, trace = traced(path, ["-e", f"trace={','.join(CALLS)}"])
    assert (code, there()) == (0, "new")
    calls = calls_of(trace)
    assert {"write", "fsync", "rename", "flock"} <= set(calls)
    outcomes = []
    for index, name in enumerate(calls):
        reset()
        nth = calls[: index + 1].count(name)
        code, _ = traced(path, ["-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={nth}"])
        assert code == -9, (index, name)
        outcomes.append(there())
        visible = [item.name for item in path.parent.iterdir() if not item.name.startswith(".")]
        assert visible == ["a.h5"]
        # The next writer succeeds, and removes the leftovers.
        write_atlas(NEW, path)
        assert there() == "new"
        assert [item.name for item in path.parent.iterdir()] == ["a.h5"]
    assert outcomes == sorted(outcomes, reverse=True), "old up to one call, new from there on"
    assert set(outcomes) == {"old", "new"}


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("write", "ENOSPC"),
        ("write", "EIO"),
        ("fsync", "EIO"),
        ("fsync", "ENOSPC"),
        ("rename", "ENOSPC"),
        ("rename", "EIO"),
        ("flock", "ENOLCK"),
    ],
)
def test_every_call_failing(place, name, error):
    path, reset, there = place
    _, trace = traced(path, ["-e", f"trace={','.join(CALLS)}"])
    for nth in range(1, calls_of(trace).count(name) + 1):
        reset()
        code, _ = traced(path, ["-e", f"trace={name}", "-e", f"inject={name}:error={error}:when={nth}"])
        assert code in (0, FAILED), f"{name} {nth}: a write that fails must say so in our words"
        if name in ("write", "rename"):
            assert (code, there()) == (FAILED, "old")
        elif code == 0:
            assert there() == "new"
        else:
            there()
        assert [item.name for item in path.parent.iterdir()] == ["a.h5"]
