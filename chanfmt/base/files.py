"""Write files and directories whole or not at all: write a temporary next to the target, fsync, rename.

A killed process may leave its temporary behind. The next process that writes the same target removes it. A writer holds
a shared lock on its temporary, so a temporary that can be locked exclusively has no writer any more. (The lock is shared
so that readers with locks of their own can open the published file.) If the file system has no locks, nothing is removed.
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
except ImportError:  # This platform has no locks, so no temporary is removed.
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def check_target(path: Path, *, overwrite: bool, directory: bool = False) -> None:
    """Raise an error, before any work, for an output that exists or that cannot be written.

    Args:
        directory: The output is a directory, not a file.

    Raises:
        UsageError: ``path`` exists and ``overwrite`` is False, or its directory is missing or read-only.
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
        if _is_special(path):
            raise UsageError(f"{path} is a device, a pipe or a socket, and is never replaced", hint="choose another -o")
    if not has_parent:
        raise UsageError(f"the directory {parent} does not exist", hint=f"create it with: mkdir -p {parent}")
    # os.access returns True for root on a read-only mount, so write a file to find out.
    probe = parent / temporary_name(path.name)
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        raise UsageError(f"cannot write in {parent}: {error.strerror}", hint="choose another -o") from None
    probe.unlink(missing_ok=True)


def check_space(directory: Path, needed: int) -> None:
    """Raise `ChanfmtError` if the file system of ``directory`` has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ChanfmtError(
            f"{directory} has {free / 1e6:,.0f} MB free and {needed / 1e6:,.0f} MB are needed",
            hint="free some space, or choose another -o",
        )


def reserve(path: Path, size: int) -> None:
    """Make the file ``path`` at least ``size`` bytes long and allocate them. Raises `OSError` if the disk is full."""
    with path.open("r+b", buffering=0) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        position = file.seek(0, os.SEEK_END)
        while position < size:
            position += file.write(bytes(min(1 << 20, size - position)))


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill ``buffer`` from ``offset`` on. Returns the number of bytes read: less than its length at the end of the file."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def write_at(descriptor: int, data: memoryview | bytes, offset: int) -> int:
    """Write all of ``data`` at ``offset``. Returns the number of bytes written."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
    return done


def temporary_name(name: str) -> str:
    """A hidden name, next to ``name``, that no other process uses."""
    return f".{name}.{uuid.uuid4().hex[:12]}.tmp"


def fsync_path(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file next to ``path``; rename it to ``path`` on success, remove it otherwise.

    Raises:
        ChanfmtError: An `OSError` occurred, in the body too.
    """
    parent = path.absolute().parent
    temporary = None
    try:
        remove_stale(path)
        temporary, lock = _create(parent, path.name, directory=False)
        with lock:
            yield temporary
            fsync_path(temporary)
            # Renaming over /dev/null as root would break the whole machine.
            if _is_special(path):
                raise ChanfmtError(f"{path} is a device, a pipe or a socket, and is never replaced", hint="choose another output")
            os.replace(temporary, path)
        fsync_path(parent)
    except OSError as error:
        raise ChanfmtError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory next to ``path``; rename it to ``path`` on success, remove it otherwise.

    An existing directory ``path`` is moved aside, and removed only after the new directory is in its place. If a process
    is killed between the two steps, the next process puts the old directory back.

    Raises:
        ChanfmtError: An `OSError` occurred, in the body too.
    """
    # If `path` is a symbolic link, the target of the link is replaced.
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
    """Remove the temporaries that killed writers of ``path`` left, and put back a directory that they moved aside."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}\.(tmp|old)")
    parent = path.absolute().parent
    try:
        names = [name for name in os.listdir(parent) if pattern.fullmatch(name)]
    except OSError:
        return
    for name in names:
        item = parent / name
        # OSError: a writer is at work, the file belongs to another user, or the file system has no locks.
        with contextlib.suppress(OSError), _lock(item, exclusive=True) as locked:
            if not locked:
                continue
            if name.endswith(".old") and not os.path.lexists(path):
                os.rename(item, path)
            elif item.is_dir():
                shutil.rmtree(item, ignore_errors=True)
            else:
                item.unlink()


def _is_special(path: Path) -> bool:
    """Whether ``path`` exists and is neither a file, nor a directory, nor a link to one."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _create(parent: Path, name: str, *, directory: bool) -> tuple[Path, contextlib.ExitStack]:
    """Create a temporary for ``name``. Returns its path, and a stack whose context holds the lock on it."""
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
                # It was not locked yet, so another process removes it.
                continue
            except OSError:
                pass  # Without locks no process removes temporaries.
            if temporary.exists():
                return temporary, stack.pop_all()


@contextlib.contextmanager
def _lock(path: Path, *, exclusive: bool) -> Iterator[bool]:
    """Hold a lock on the file or directory ``path``. Yields whether this platform has locks.

    Raises:
        OSError: Another process holds a lock, or this file system has no locks.
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
    """Replace the directory ``path`` by the directory ``new``."""
    # Its suffix differs from a temporary's: for a moment this is the only copy of the target.
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
