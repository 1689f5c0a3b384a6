"""Write files and directories whole or not at all: write a temporary next to the target, fsync, rename.

What appears at the target in the meantime is not replaced, unless the caller says so; the finished work is then kept under
another name. What is replaced keeps its nature: a new file has the mode and the owner of the old one, and a symbolic link
stays a link, whose target is replaced.

A killed process may leave its temporary behind. The next process that writes the same target removes it. A writer holds
a shared lock on its temporary, so a temporary that can be locked exclusively has no writer any more. (The lock is shared
so that readers with locks of their own can open the published file.) If the file system has no locks, nothing is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from chanfmt.base.errors import ChanfmtError, UsageError
from chanfmt.base.publishing import exchange, inherit_nature, put_in_place

try:
    import fcntl
except ImportError:  # This platform has no locks, so no temporary is removed.
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator

_SPECIAL = "a device, a pipe or a socket, and is never replaced"
PARTIAL_SUFFIX = ".partial"
"""Ending of the name of a partial atlas."""
_LONGEST = 200
"""Bytes of a name that the names of its temporaries and its companions repeat. A name may have 255 bytes, and theirs are longer."""


def output_path(name: str | os.PathLike[str]) -> Path:
    """The path of the output that a user calls ``name``, with ``~`` expanded.

    Raises:
        UsageError: ``name`` is ``-``, which stands for standard output in other programs.
    """
    text = os.fspath(name)
    if text == "-":
        raise UsageError("the output is a file, and cannot be standard output", hint="name a file; one that is called - is ./-")
    return Path(os.path.expanduser(text))


def real_path(path: Path) -> Path:
    """Absolute path of what ``path`` names, at the end of all symbolic links."""
    # `Path.resolve` raises RuntimeError for links in a circle.
    return Path(os.path.realpath(path))


def check_target(path: Path, *, overwrite: bool, directory: bool = False) -> None:
    """Raise an error, before any work, for an output that exists or that cannot be written.

    Args:
        directory: The output is a directory, not a file.

    Raises:
        UsageError: ``path`` exists and ``overwrite`` is False, or its directory is missing or read-only.
    """
    what = "directory" if directory else "file"
    try:
        there, is_directory, special = os.path.lexists(path), path.is_dir(), _is_special(path)
        # If `path` is a symbolic link, the target of the link is written.
        parent = real_path(path).parent
        has_parent = parent.is_dir()
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", hint="choose another -o") from None
    if there:
        if special:
            raise UsageError(f"{path} is {_SPECIAL}", hint="choose another -o")
        # No --overwrite replaces the one by the other.
        if is_directory != directory and path.exists():
            raise UsageError(f"{path} exists and is not a {what}", hint="choose another -o")
        if not overwrite:
            raise UsageError(f"the output {what} {path} exists", hint="choose another -o, or add --overwrite")
    if not has_parent:
        raise UsageError(f"the directory {parent} does not exist", hint=f"create it with: mkdir -p {parent}")
    # os.access returns True for root on a read-only mount, so write a file to find out.
    probe = parent / temporary_name(path.name)
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        raise UsageError(f"cannot write in {parent}: {error.strerror}", hint="choose another -o") from None
    probe.unlink(missing_ok=True)


def check_space(directory: Path, needed: int, *, hint: str = "free some space, or choose another -o") -> None:
    """Raise `ChanfmtError` with ``hint`` if the file system of ``directory`` has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ChanfmtError(
            f"{directory} has {free / 1e6:,.0f} MB free and {needed / 1e6:,.0f} MB are needed",
            hint=hint,
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
    return f"{hidden_stem(name)}.{uuid.uuid4().hex[:12]}.tmp"


def hidden_stem(name: str) -> str:
    """The beginning of the names of hidden files that belong to ``name``."""
    raw = os.fsencode(name)
    return f".{name}" if len(raw) <= _LONGEST else f".{hashlib.sha256(raw).hexdigest()}"


def stem_beside(name: str) -> str:
    """The beginning of the names of visible files that belong to ``name``: ``name`` itself, unless it is too long for an ending."""
    raw = os.fsencode(name)
    return name if len(raw) <= _LONGEST else f"{name[:50]}-{hashlib.sha256(raw).hexdigest()[:16]}"


def partial_beside(path: Path) -> Path:
    """Where an unfinished build of the atlas ``path`` keeps what it has measured."""
    return path.with_name(stem_beside(path.name) + PARTIAL_SUFFIX)


def fsync_path(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary file next to ``path``; rename it to ``path`` on success, remove it otherwise.

    Args:
        overwrite: Replace ``path`` if it exists, and keep its mode and its owner.

    Raises:
        OutputAppearedError: ``path`` exists, and ``overwrite`` is False. The file is kept beside it.
        ChanfmtError: An `OSError` occurred, in the body too.
    """
    target = real_path(path)
    temporary = None
    try:
        # Renaming over /dev/null as root would break the whole machine.
        if _is_special(path):
            raise ChanfmtError(f"{path} is {_SPECIAL}", hint="choose another output")
        remove_stale(target)
        temporary, lock = _create(target, directory=False)
        with lock:
            yield temporary
            fsync_path(temporary)
            if overwrite and (not os.path.lexists(target) or target.is_file()):
                inherit_nature(temporary, target)
                os.replace(temporary, target)
            else:
                put_in_place(temporary, target, path)
        fsync_path(target.parent)
    except OSError as error:
        raise ChanfmtError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory next to ``path``; rename it to ``path`` on success, remove it otherwise.

    An existing directory ``path`` changes places with the new directory in one step. If the file system cannot do that, it
    is moved aside, and removed only after the new directory is in its place; if a process is killed between the two steps,
    the next process puts the old directory back.

    Args:
        overwrite: Replace the directory ``path`` if it exists. Modes and owners stay, for files of the same names too.

    Raises:
        OutputAppearedError: ``path`` exists and may not be replaced. The directory is kept beside it.
        ChanfmtError: An `OSError` occurred, in the body too.
    """
    target = real_path(path)
    temporary = None
    try:
        remove_stale(target)
        temporary, lock = _create(target, directory=True)
        with lock:
            yield temporary
            for item in temporary.rglob("*"):
                fsync_path(item)
                if overwrite:
                    inherit_nature(item, target / item.relative_to(temporary))
            fsync_path(temporary)
            if overwrite and target.is_dir():
                inherit_nature(temporary, target)
                _swap(temporary, target)
            else:
                put_in_place(temporary, target, path)
        fsync_path(target.parent)
    except OSError as error:
        raise ChanfmtError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_stale(path: Path) -> None:
    """Remove the temporaries that killed writers of ``path`` left, and put back a directory that they moved aside."""
    path = real_path(path)
    pattern = re.compile(rf"{re.escape(hidden_stem(path.name))}\.[0-9a-f]{{12}}\.(tmp|old)")
    parent = path.parent
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


def _create(target: Path, *, directory: bool) -> tuple[Path, contextlib.ExitStack]:
    """Create a temporary for ``target``. Returns its path, and a stack whose context holds the lock on it."""
    # Until it has the mode of what it replaces, nobody else may read it.
    private = 0o700 if os.path.lexists(target) else 0o777
    while True:
        temporary = target.parent / temporary_name(target.name)
        if directory:
            temporary.mkdir(mode=private)
        else:
            temporary.touch(mode=private & 0o666, exist_ok=False)
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
    """Replace the directory ``path`` by the directory ``new``. The old one is removed, or is at ``new`` afterwards."""
    if exchange(new, path):
        return
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
