"""Every system call of a small write interrupted in turn: the target is the old atlas or the new one, never a third thing."""

from __future__ import annotations

import sys

import pytest

from chanfmt.format.writer import write_atlas
from tests.support.crash.harness import content, same
from tests.support.crash.trace import CALLS, FAILED, STRACE, calls_of, trace
from tests.support.factory import random_content

pytestmark = pytest.mark.skipif(STRACE is None or sys.platform != "linux", reason="needs strace, which only Linux has")


def traced(path, options):
    """Write new content to ``path`` in a child that strace follows. Returns exit code and trace."""
    return trace(lambda: write_atlas(NEW, path), path.parent.parent / "trace", options)


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


def test_killed_at_every_call(place):
    path, reset, there = place
    code, log = traced(path, ["-e", f"trace={','.join(CALLS)}"])
    assert (code, there()) == (0, "new")
    calls = calls_of(log)
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
    _, log = traced(path, ["-e", f"trace={','.join(CALLS)}"])
    for nth in range(1, calls_of(log).count(name) + 1):
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
