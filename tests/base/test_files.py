"""A killed writer leaves a temporary next to its target; only the next writer may remove it."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import signal
import socket
import stat
import sys
import time
from typing import TYPE_CHECKING

import pytest

from chanfmt.base import files
from chanfmt.base.errors import ChanfmtError, UsageError
from chanfmt.base.files import atomic_file, check_target
from tests.support.crash.harness import child
from tests.support.crash.trace import STRACE, trace
from tests.support.refused import in_child, on_file_systems

if TYPE_CHECKING:
    from pathlib import Path

fcntl = pytest.importorskip("fcntl")


def killed_inside(context, path: Path) -> None:
    """Run ``context(path)`` in a process that dies inside it, after writing something."""
    pid = os.fork()
    if pid == 0:
        with context(path) as temporary:
            target = temporary / "part" if temporary.is_dir() else temporary
            target.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def names(directory: Path) -> list[str]:
    return sorted(item.name for item in directory.iterdir())


def read(path: Path) -> str:
    return (path / "whole" if path.is_dir() else path).read_text()


def write(context, path: Path, text: str) -> None:
    with context(path, overwrite=True) as temporary:
        (temporary / "whole" if temporary.is_dir() else temporary).write_text(text)


@pytest.mark.parametrize("context", [files.atomic_file, files.atomic_directory])
def test_the_next_writer_removes_what_a_killed_one_left(context, tmp_path):
    path = tmp_path / "a.h5"
    write(context, path, "old")
    killed_inside(context, path)
    assert read(path) == "old"
    assert len(names(tmp_path)) == 2
    write(context, path, "new")
    assert (read(path), names(tmp_path)) == ("new", ["a.h5"])


@pytest.mark.parametrize("context", [files.atomic_file, files.atomic_directory])
def test_a_writer_at_work_is_left_alone(context, tmp_path):
    path = tmp_path / "a.h5"
    with context(path, overwrite=True) as temporary:
        pid = os.fork()
        if pid == 0:
            write(context, path, "theirs")
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert temporary.exists()
        (temporary / "whole" if temporary.is_dir() else temporary).write_text("ours")
    assert (read(path), names(tmp_path)) == ("ours", ["a.h5"])


def test_only_temporaries_of_this_very_target_are_stale(tmp_path):
    kept = [
        ".a.h5.0123456789ab.tmp.bak",
        ".a.h5.0123456789AB.tmp",
        ".a.h5.123.tmp",
        ".b.h5.0123456789ab.tmp",
        ".aXh5.0123456789ab.tmp",
        ".a.h5.partial.0123456789ab.tmp",
    ]
    for name in [*kept, ".a.h5.0123456789ab.tmp"]:
        (tmp_path / name).write_text("x")
    (tmp_path / ".a.h5.ba9876543210.tmp").symlink_to(tmp_path / "a.h5")
    os.mkfifo(tmp_path / ".a.h5.aaaaaaaaaaaa.tmp")
    files.remove_stale(tmp_path / "a.h5")
    assert names(tmp_path) == sorted([*kept, ".a.h5.ba9876543210.tmp", ".a.h5.aaaaaaaaaaaa.tmp"])


def test_a_directory_that_was_moved_aside_is_put_back(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "whole").write_text("old")
    path.rename(tmp_path / ".model.0123456789ab.old")
    files.remove_stale(path)
    assert (read(path), names(tmp_path)) == ("old", ["model"])
    (tmp_path / ".model.0123456789ab.old").mkdir()
    files.remove_stale(path)
    assert names(tmp_path) == ["model"]


@on_file_systems(none={"flock": errno.EOPNOTSUPP})
def test_without_locks_nothing_is_removed(tmp_path, kind):
    stale = tmp_path / ".a.h5.0123456789ab.tmp"
    stale.write_text("x")
    write(files.atomic_file, tmp_path / "a.h5", "new")
    write(files.atomic_directory, tmp_path / "b", "new")
    assert names(tmp_path) == [stale.name, "a.h5", "b"]


def test_on_a_platform_without_locks_nothing_is_removed(tmp_path):
    stale = tmp_path / ".a.h5.0123456789ab.tmp"
    stale.write_text("x")

    def work():
        sys.modules["fcntl"] = None
        importlib.reload(files)
        write(files.atomic_file, tmp_path / "a.h5", "new")
        write(files.atomic_directory, tmp_path / "b", "new")

    in_child(work, {})
    assert names(tmp_path) == [stale.name, "a.h5", "b"]


@pytest.mark.skipif(STRACE is None or sys.platform != "linux", reason="needs strace, which only Linux has")
@pytest.mark.parametrize("moment", ["removed", "being removed"])
def test_a_temporary_taken_for_stale_while_it_was_made_is_made_again(tmp_path, moment):
    """The first lock of the writer comes late, so that another process takes its temporary for stale."""
    place = tmp_path / "d"

    def remove():
        while not (found := [name for name in names(place) if name.endswith(".tmp")]):
            time.sleep(0.01)
        with open(place / found[0], "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if moment == "being removed":
                # Until the writer makes another one.
                while len(names(place)) < 2:
                    time.sleep(0.01)
            (place / found[0]).unlink()

    # On a busy machine, the other process may come too late.
    for milliseconds in (300, 3000, 10000):
        place.mkdir()
        remover = child(remove)
        late = ["-e", "trace=flock", "-e", f"inject=flock:delay_enter={milliseconds * 1000}:when=1"]
        code, log = trace(lambda: write(files.atomic_file, place / "a.h5", "new"), tmp_path / "log", late)
        assert (code, read(place / "a.h5")) == (0, "new")
        if log.count("flock(") == 2:
            break
        os.kill(remover, signal.SIGKILL)
        os.waitpid(remover, 0)
        shutil.rmtree(place)
    assert os.waitpid(remover, 0)[1] == 0
    assert names(place) == ["a.h5"]


def test_readers_with_locks_of_their_own_open_what_is_published(tmp_path):
    with files.atomic_file(tmp_path / "a.h5") as temporary:
        descriptor = os.open(temporary, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.close(descriptor)


def test_errors_are_ours(tmp_path):
    with pytest.raises(ChanfmtError, match="cannot write"), files.atomic_file(tmp_path / "no" / "a.h5"):
        pass
    with pytest.raises(ChanfmtError, match="cannot write"), files.atomic_directory(tmp_path / ("x" * 300)):
        pass


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_devices_pipes_and_sockets_are_never_replaced(tmp_path, kind):
    path = tmp_path / "special"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root makes devices")
    before = path.stat()
    with pytest.raises(UsageError, match="never replaced"):
        check_target(path, overwrite=True)
    with pytest.raises(ChanfmtError, match="never replaced"), atomic_file(path) as temporary:
        temporary.write_text("x")
    assert path.stat() == before
    assert [item.name for item in tmp_path.iterdir()] == ["special"]
