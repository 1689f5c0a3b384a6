"""Publish files and directories whole or not at all: write beside, fsync, rename."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from typing import TYPE_CHECKING

from chanfmt.errors import ChanfmtError, UsageError

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
    probe.unlink()


def check_space(directory: Path, needed: int) -> None:
    """Raise `ChanfmtError` where the file system of ``directory`` has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ChanfmtError(
            f"{directory} has {free / 1e6:,.0f} MB free and {needed / 1e6:,.0f} MB are needed",
            hint="free some space, or choose another -o",
        )


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
    """Yield a temporary path beside ``path``; publish it on success, remove it otherwise."""
    temporary = path.absolute().parent / temporary_name(path.name)
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.absolute().parent)
    except OSError as error:
        raise ChanfmtError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside ``path``; publish it on success, remove it otherwise.

    An existing ``path`` is moved aside and removed only after the new one is in place.
    """
    # Behind a symbolic link it is the link's target that is replaced.
    path = path.resolve()
    temporary = path.parent / temporary_name(path.name)
    try:
        temporary.mkdir()
        yield temporary
        for item in temporary.rglob("*"):
            fsync_path(item)
        fsync_path(temporary)
        if path.exists():
            old = path.parent / temporary_name(path.name)
            os.rename(path, old)
            try:
                os.rename(temporary, path)
            except OSError:
                os.rename(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, path)
        fsync_path(path.parent)
    except OSError as error:
        raise ChanfmtError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
