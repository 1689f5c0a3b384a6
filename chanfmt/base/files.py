"""Publish files and directories whole or not at all: write beside, fsync, rename.

What a killed process left behind is removed by the next one that writes the same target. A
temporary is locked (shared, so that readers with locks of their own still open what it becomes)
while its writer lives; one that can be locked exclusively has no writer any more. Where locks do
not work, nothing is removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import uuid
from typing import TYPE_CHECKING

from chanfmt.base.errors import ChanfmtError, UsageError

try:
    import fcntl
except ImportError:  # Not on this platform: no locks, and nothing is taken for stale.
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def check_target(path: Path, *, overwrite: bool, directory: bool = False) -> None:
    """Refuse, before any work, an output that exists or that cannot be written.

    Args:
        directory: The output is a directory, not a file.

    Raises:
        UsageError: ``path`` exists and ``overwrite`` is off, or its directory is missing or read-only.
    """
    what = "directory" if directory else "file"
    try:
        there, is_directory = os.path.lexists(path), path.is_dir()
        parent = path.absolute().parent
        has_parent = parent.is_dir()
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", hint="choose another -o") from None
    if there:
        if not overwrite:
            raise UsageError(f"the output {what} {path} exists", hint="choose another -o, or add --overwrite")
        if is_directory != directory:
            raise UsageError(f"{path} exists and is not a {what}", hint="choose another -o")
    if not has_parent:
        raise UsageError(f"the directory {parent} does not exist", hint=f"create it with: mkdir -p {parent}")
    # os.access says yes to root on read-only mounts, so try it.
    probe = parent / temporary_name(path.name)
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        raise UsageError(f"cannot write in {parent}: {error.strerror}", hint="choose another -o") from None
    probe.unlink(missing_ok=True)


def check_space(directory: Path, needed: int) -> None:
    """Raise `ChanfmtError` where the file system of ``directory`` has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ChanfmtError(
            f"{directory} has {free / 1e6:,.0f} MB free and {needed / 1e6:,.0f} MB are needed",
            hint="free some space, or choose another -o",
        )


def reserve(path: Path, size: int) -> None:
    """Make the file ``path`` at least ``size`` bytes long, and take the room for them. Raises `OSError` where there is none."""
    with path.open("r+b", buffering=0) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        position = file.seek(0, os.SEEK_END)
        while position < size:
            position += file.write(bytes(min(1 << 20, size - position)))


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill ``buffer`` from ``offset`` on. Returns how many bytes there were: fewer than it holds at the file's end."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def write_at(descriptor: int, data: memoryview | bytes, offset: int) -> int:
    """Write all of ``data`` at ``offset``. Returns how many bytes that were."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
    return done


def temporary_name(name: str) -> str:
    """A hidden sibling name for ``name`` that no other process uses."""
    return f".{name}.{uuid.uuid4().hex[:12]}.tmp"


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the path of an empty temporary file beside ``path``; publish it on success, remove it otherwise.

    Raises:
        ChanfmtError: For every `OSError` on the way.
    """
    parent = path.absolute().parent
    temporary = None
    try:
        remove_stale(path)
        temporary, lock = _create(parent, path.name, directory=False)
        with lock:
            yield temporary
            fsync_path(temporary)
            os.replace(temporary, path)
        fsync_path(parent)
    except OSError as error:
        raise ChanfmtError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside ``path``; publish it on success, remove it otherwise.

    An existing ``path`` is moved aside and removed only after the new one is in place; one that a
    killed process left aside is put back.

    Raises:
        ChanfmtError: For every `OSError` on the way.
    """
    # Behind a symbolic link it is the link's target that is replaced.
    path = path.resolve()
    temporary = None
    try:
        remove_stale(path)
        temporary, lock = _create(path.parent, path.name, directory=True)
        with lock:
            yield temporary
            for item in temporary.rglob("*"):
                fsync_path(item)
            fsync_path(temporary)
            if path.exists():
                _swap(temporary, path)
            else:
                os.rename(temporary, path)
        fsync_path(path.parent)
    except OSError as error:
        raise ChanfmtError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_stale(path: Path) -> None:
    """Remove what killed writers of ``path`` left beside it, and put back a directory they had moved aside."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}\.(tmp|old)")
    parent = path.absolute().parent
    try:
        names = [name for name in os.listdir(parent) if pattern.fullmatch(name)]
    except OSError:
        return
    for name in names:
        item = parent / name
        # A writer at work, another user's file, a file system without locks: each is an OSError.
        with contextlib.suppress(OSError), _lock(item, exclusive=True) as locked:
            if not locked:
                continue
            if name.endswith(".old") and not os.path.lexists(path):
                os.rename(item, path)
            elif item.is_dir():
                shutil.rmtree(item, ignore_errors=True)
            else:
                item.unlink()


def _create(parent: Path, name: str, *, directory: bool) -> tuple[Path, contextlib.ExitStack]:
    """A new temporary for ``name``, and the lock on it: release it by leaving the stack's context."""
    while True:
        temporary = parent / temporary_name(name)
        if directory:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(_lock(temporary, exclusive=False))
            except (BlockingIOError, FileNotFoundError):
                # Before it was locked it looked stale, and another process is taking it away.
                continue
            except OSError:
                pass  # No locks here: nobody will take it for stale.
            if temporary.exists():
                return temporary, stack.pop_all()


@contextlib.contextmanager
def _lock(path: Path, *, exclusive: bool) -> Iterator[bool]:
    """Hold a lock on the file or directory ``path``; yields whether there are locks at all.

    Raises:
        OSError: Another process holds one, or this file system has none.
    """
    if fcntl is None:
        yield False
        return
    # An exclusive lock needs a writable descriptor on NFS.
    access = os.O_RDWR if exclusive and not path.is_dir() else os.O_RDONLY
    descriptor = os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not (stat.S_ISREG(mode := os.fstat(descriptor).st_mode) or stat.S_ISDIR(mode)):
            raise OSError(f"{path} is neither a file nor a directory")
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        yield True
    finally:
        os.close(descriptor)


def _swap(new: Path, path: Path) -> None:
    """Put the directory ``new`` where the directory ``path`` is, and remove that one."""
    # Another suffix than a temporary's: it is all there is of the target for a moment.
    old = path.parent / (temporary_name(path.name).removesuffix("tmp") + "old")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(_lock(path, exclusive=False))
        os.rename(path, old)
        try:
            os.rename(new, path)
        except OSError:
            os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
