"""A claim on an output: the second of two commands that would write the same output notices the first before it works.

The claim is a small hidden file next to the output. Its owner holds a lock on it, which the system releases when the process
ends in whatever way, so a claim that can be locked is left over, and is taken. A file system without locks leaves the
process number and the machine that the file names. On a network file system, creating a file that must not exist is one step.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import time
from typing import TYPE_CHECKING, NamedTuple

from chanfmt.base.errors import UsageError
from chanfmt.base.files import hidden_stem, real_path

try:
    import fcntl
except ImportError:  # This platform has no locks.
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_MOST = 1000
"""Bytes of a claim that are read."""
_WRITING_SECONDS = 10.0
"""A process that made the file of its claim has written its name into it after that time."""


class Owner(NamedTuple):
    """The process that holds a claim.

    Attributes:
        machine: Name of its machine.
        process: Its number.
        start: When it started, in the system's clock ticks, which tells it from a later process of the same number; empty
            if this system does not say.
    """

    machine: str
    process: int
    start: str

    @classmethod
    def this(cls) -> Owner:
        return cls(socket.gethostname(), os.getpid(), _start(os.getpid()))

    @classmethod
    def read(cls, descriptor: int) -> Owner | None:
        """The owner that an open claim names; None if it names nobody."""
        machine, _, rest = os.pread(descriptor, _MOST, 0).decode("utf-8", "replace").partition("\n")
        number, _, start = rest.partition("\n")
        return cls(machine, int(number), start.strip()) if number.isascii() and number.isdigit() and len(number) < 10 else None

    def write(self, descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{self.machine}\n{self.process}\n{self.start}\n".encode(), 0)

    @property
    def may_run(self) -> bool:
        """Whether the process may be running. What runs on another machine is not known."""
        if self.machine != socket.gethostname():
            return True
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass  # It runs as another user.
        return not self.start or self.start == _start(self.process)


def claim_path(path: Path) -> Path:
    """File of the claim on the output ``path``."""
    target = real_path(path)
    return target.parent / f"{hidden_stem(target.name)}.claim"


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold the claim on the output ``path`` in the body. If no claim can be made there, there is none.

    Raises:
        UsageError: Another process holds it.
    """
    place = claim_path(path)
    descriptor = None
    # A directory that cannot be written is the business of whoever writes the output.
    with contextlib.suppress(OSError):
        descriptor = _taken(place, path)
    try:
        yield
    finally:
        if descriptor is not None:
            # Remove the file before the lock goes, so that nobody waits for a lock on a file without a name.
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(place)):
                    os.unlink(place)
            os.close(descriptor)


def _taken(place: Path, path: Path) -> int:
    """Take the claim in the file ``place``. Returns the descriptor that holds it. Raises `UsageError` and `OSError`."""
    while True:
        try:
            made, descriptor = True, os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            try:
                made, descriptor = False, _opened(place)
            except FileNotFoundError:
                continue
        try:
            locked = _lock(descriptor)
            if locked is False or (locked is None and not made and _is_held(descriptor)):
                raise _busy(path, place, Owner.read(descriptor), lasting=locked is None)
            if _has_name(descriptor, place):
                if locked is not None or made:
                    # On a full disk, the lock is the claim.
                    with contextlib.suppress(OSError):
                        Owner.this().write(descriptor)
                    return descriptor
                # Without locks, only making the file is one step.
                os.unlink(place)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _opened(place: Path) -> int:
    """Open an existing claim; that of another user for reading, which is enough to see whether it is held."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(place, os.O_RDWR | flags)
    except PermissionError:
        return os.open(place, os.O_RDONLY | flags)


def _lock(descriptor: int) -> bool | None:
    """Lock a claim. Returns whether it could be locked; None if there are no locks here. Raises `OSError` for another kind of file."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError("not a file")
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_held(descriptor: int) -> bool:
    """Whether a claim may be held, as far as its text tells."""
    owner = Owner.read(descriptor)
    if owner is None:
        return time.time() - os.fstat(descriptor).st_mtime < _WRITING_SECONDS
    return owner.may_run


def _has_name(descriptor: int, place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(place))
    except FileNotFoundError:
        return False


def _busy(path: Path, place: Path, owner: Owner | None, *, lasting: bool) -> UsageError:
    who = "another process" if owner is None else f"process {owner.process} on {owner.machine}"
    remedy = f"; if that process has ended, remove {place}" if lasting else ""
    return UsageError(f"{who} is writing {path}", hint=f"wait until it ends, or choose another -o{remedy}")


def _start(process: int) -> str:
    """Clock ticks between the start of the system and the start of a process; empty if the system does not say."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            # The name of the program, in parentheses, may hold anything.
            return file.read().rpartition(b")")[2].split()[19].decode("ascii")
    except (OSError, IndexError, ValueError):
        return ""
