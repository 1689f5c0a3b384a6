"""Put a finished file or directory in its place: without replacing what appeared there, or with the nature of what was there."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from typing import TYPE_CHECKING

from chanfmt.base.errors import ChanfmtError

if TYPE_CHECKING:
    from pathlib import Path

KEPT_SUFFIX = ".new"
"""Ends the name of a finished output that could not take its place."""
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_AT_FDCWD = -100
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EMLINK)
_ACCESS_LISTS = ("system.posix_acl_access", "system.posix_acl_default")


class OutputAppearedError(ChanfmtError):
    """Something took the place of an output while the command ran. The finished work is kept under another name.

    Attributes:
        kept: Path of the finished work.
    """

    def __init__(self, path: Path, kept: Path) -> None:
        super().__init__(
            f"{path} appeared while this command ran, and was not replaced", hint=f"the finished result is in {kept}"
        )
        self.kept = kept


def put_in_place(finished: Path, target: Path, name: Path) -> None:
    """Rename the file or directory ``finished`` to ``target``, which must not exist.

    Args:
        name: What the user calls ``target``.

    Raises:
        OutputAppearedError: ``target`` exists. ``finished`` is kept beside it.
        OSError: The file system fails.
    """
    if not rename_new(finished, target):
        raise OutputAppearedError(name, keep_beside(finished, target))


def keep_beside(finished: Path, target: Path) -> Path:
    """Rename ``finished`` to a new name beside ``target``, and return its path. Raises `OSError`."""
    # A name may have 255 bytes.
    stem = target.name if len(os.fsencode(target.name)) < 240 else target.name[:50]
    number = 1
    while True:
        kept = target.with_name(f"{stem}{KEPT_SUFFIX}{'' if number == 1 else f'-{number}'}")
        if rename_new(finished, kept):
            return kept
        number += 1


def rename_new(source: Path, target: Path) -> bool:
    """Rename ``source`` to ``target`` unless ``target`` exists, in one step where the file system can.

    Returns:
        Whether it was renamed. If not, ``target`` exists.

    Raises:
        OSError: The file system fails.
    """
    number = _renameat2(source, target, _RENAME_NOREPLACE)
    if number == 0:
        return True
    if number in (errno.EEXIST, errno.ENOTEMPTY):
        return False
    return _rename_directory(source, target) if source.is_dir() else _link(source, target)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two files or directories in one step. Returns whether the file system can. Raises `OSError` if it fails."""
    return _renameat2(one, other, _RENAME_EXCHANGE) == 0


def inherit_nature(new: Path, old: Path) -> None:
    """Give ``new`` the mode, the access list, and if we may the owner and the group, of ``old``, if ``old`` exists.

    Raises:
        OSError: The mode cannot be set.
    """
    try:
        was, now = os.lstat(old), os.lstat(new)
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_IFMT(was.st_mode) != stat.S_IFMT(now.st_mode) or stat.S_ISLNK(was.st_mode):
        return
    if hasattr(os, "chown") and (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid):
        try:
            os.chown(new, was.st_uid, was.st_gid)
        except OSError:
            with contextlib.suppress(OSError):
                os.chown(new, -1, was.st_gid)
    for name in _ACCESS_LISTS if hasattr(os, "setxattr") else ():
        # Without its list, the mode of a file that has one would give the group the rights of others on the list.
        with contextlib.suppress(OSError):
            os.setxattr(new, name, os.getxattr(old, name))
    now = os.lstat(new)
    # A program must not run as its owner if that is not the owner that the bit was set for.
    mode = stat.S_IMODE(was.st_mode) & (0o7777 if now.st_uid == was.st_uid else 0o777)
    if stat.S_IMODE(now.st_mode) != mode:
        os.chmod(new, mode)


def _renameat2(source: Path, target: Path, flags: int) -> int:
    """Call Linux's renameat2. Returns 0, EEXIST, ENOTEMPTY, or ENOSYS if the system or the file system lacks the call.

    Raises:
        OSError: The file system fails.
    """
    if sys.platform != "linux":
        return errno.ENOSYS
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return errno.ENOSYS
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return 0
    number = ctypes.get_errno()
    if number in (errno.EEXIST, errno.ENOTEMPTY):
        return number
    if number in _NOT_SUPPORTED:
        return errno.ENOSYS
    raise OSError(number, os.strerror(number), os.fspath(target))


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        # The server of a network file system may have linked it, and its first answer got lost.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(source), os.lstat(target)):
                source.unlink()
                return True
        return False
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        # A file system with neither call, such as FAT: the moment between the two steps remains.
        if os.path.lexists(target):
            return False
        os.rename(source, target)
        return True
    source.unlink()
    return True


def _rename_directory(source: Path, target: Path) -> bool:
    try:
        os.mkdir(target)
    except FileExistsError:
        return False
    try:
        # A directory may take the place of an empty one, and of no other.
        os.rename(source, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.rmdir(target)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True
