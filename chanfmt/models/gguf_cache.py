"""The cache of dequantised GGUF files: one directory for each file content and each version of the code that converts it.

An entry is a directory ``KEY`` with ``conversion.json`` and the checkpoint in ``model/``. Beside it lies the hidden file
``.KEY.lock``. A process holds a shared lock on that file as long as it uses the entry, and an exclusive lock while it makes
or removes the entry. No symbolic link in the cache is followed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import stat
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import msgspec
import platformdirs

from chanfmt.base.errors import ChanfmtError
from chanfmt.base.files import atomic_directory, check_space, remove_stale
from chanfmt.base.narrate import say
from chanfmt.base.parsed import parse_json

try:
    import fcntl
except ImportError:  # This platform has no locks. Nothing else here may remove an entry that is in use.
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CONVERSION = 4
"""Version of `chanfmt.models.gguf`: raise it when the same file would be converted to other weights, config or tokenizer."""
PACKAGES = ("transformers", "gguf")
"""The packages that convert."""
MODEL_DIRECTORY = "model"
RECORD_FILE = "conversion.json"

_LONGEST_RECORD = 1 << 16
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}\.(?:tmp|old)")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_held: dict[str, int] = {}
"""Path of an entry to the descriptor that holds its lock until the process ends."""


@dataclass(frozen=True)
class Conversion:
    """What an entry was made from, and by what.

    Attributes:
        file: Name of the GGUF file, without its directory.
        sha256: Digest of the file.
        bytes: Size of the file.
        converter: Package to version; ``conversion`` is `CONVERSION`.
    """

    file: str
    sha256: str
    bytes: int
    converter: dict[str, str]

    @property
    def key(self) -> str:
        """Name of the entry."""
        return "-".join([self.sha256[:16], *(f"{name}{number}" for name, number in self.converter.items())])


@dataclass(frozen=True)
class Entry:
    """A directory, or a link, in the cache.

    Attributes:
        name: Its name in the cache.
        state: ``ready``; ``unfinished`` (a killed process left it); ``unknown`` (an older chanfmt made it, or something else).
        bytes: Size of its files.
        last_used: Time of the last use, or of the last change if that is unknown, in seconds since 1970.
        conversion: What it was made from; None if that is unknown.
    """

    name: str
    state: str
    bytes: int
    last_used: float
    conversion: Conversion | None


def cache_directory() -> Path:
    """The directory of the cache, which may not exist yet."""
    return platformdirs.user_cache_path("chanfmt", appauthor=False) / "gguf"


def converter() -> dict[str, str]:
    """Versions of the code that converts. A package that is not installed is left out."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"conversion": str(CONVERSION)}


def cached(path: Path, convert: Callable[[Path, Path], None]) -> Path:
    """The directory of the checkpoint that ``convert`` makes of the GGUF file ``path``. It is made if it is not in the cache.

    Args:
        convert: Called with ``path`` and an empty directory for the checkpoint.

    Raises:
        ChanfmtError: The cache cannot be written, or the disk is full.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    conversion = Conversion(path.name, digest, path.stat().st_size, converter())
    home = cache_directory()
    entry = home / conversion.key
    try:
        home.mkdir(parents=True, exist_ok=True)
        while not _taken(entry, path.name):
            with _exclusive(entry, wait=True):
                # The process that held the lock before may have made the entry.
                if not _is_whole(entry):
                    _make(entry, conversion, path, convert)
    except OSError as error:
        reason = error.strerror or error
        raise ChanfmtError(f"cannot use {home} for the dequantised model: {reason}", hint="set XDG_CACHE_HOME") from None
    # A cache that is read-only for this user works all the same.
    with contextlib.suppress(OSError):
        os.utime(entry / RECORD_FILE)
    return entry / MODEL_DIRECTORY


def _make(entry: Path, conversion: Conversion, path: Path, convert: Callable[[Path, Path], None]) -> None:
    # A value takes at least half a byte in the file, and four bytes in the checkpoint.
    check_space(entry.parent, 8 * conversion.bytes)
    say(f"dequantising {path.name} to {entry} (once)")
    _delete(entry)
    with atomic_directory(entry, overwrite=True) as temporary:
        (temporary / MODEL_DIRECTORY).mkdir()
        convert(path, temporary / MODEL_DIRECTORY)
        (temporary / RECORD_FILE).write_bytes(msgspec.json.encode(asdict(conversion)))


def entries() -> list[Entry]:
    """What the cache holds, last used first."""
    try:
        names = sorted(os.listdir(cache_directory()))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ChanfmtError(f"cannot read {cache_directory()}: {error.strerror}") from None
    found = []
    for name in names:
        if name.startswith(".") and not _TEMPORARY.fullmatch(name):
            continue
        # Another process may remove it in this moment.
        with contextlib.suppress(FileNotFoundError):
            found.append(_entry(cache_directory() / name))
    return sorted(found, key=lambda item: -item.last_used)


def _entry(path: Path) -> Entry:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return Entry(path.name, "unknown", status.st_size, status.st_mtime, None)
    if _TEMPORARY.fullmatch(path.name):
        return Entry(path.name, "unfinished", _size(path), status.st_mtime, None)
    conversion = _record(path / RECORD_FILE)
    if conversion is None or not _is_whole(path):
        return Entry(path.name, "unknown", _size(path), status.st_mtime, None)
    return Entry(path.name, "ready", _size(path), (path / RECORD_FILE).lstat().st_mtime, conversion)


def remove(name: str) -> bool:
    """Remove the entry ``name``. Returns False, and removes nothing, if a process uses or makes it.

    Raises:
        ChanfmtError: It cannot be removed.
    """
    path = cache_directory() / name
    temporary = _TEMPORARY.fullmatch(name)
    try:
        if temporary:
            remove_stale(path.with_name(temporary[1]))
            return not os.path.lexists(path)
        with _exclusive(path) as alone:
            if alone:
                _delete(path)
                _lock_of(path).unlink(missing_ok=True)
            return alone
    except OSError as error:
        raise ChanfmtError(f"cannot remove {path}: {error.strerror or error}") from None


def _delete(path: Path) -> None:
    """Remove a file, a link or a directory, if it exists. The target of a link stays."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        path.unlink()
        return
    # An entry that is removed in part must not look whole.
    (path / RECORD_FILE).unlink(missing_ok=True)
    shutil.rmtree(path)


def _is_whole(entry: Path) -> bool:
    return _is_plain(entry, stat.S_ISDIR) and _is_plain(entry / MODEL_DIRECTORY, stat.S_ISDIR) and _is_plain(entry / RECORD_FILE)


def _is_plain(path: Path, kind: Callable[[int], bool] = stat.S_ISREG) -> bool:
    """Whether ``path`` itself, not the target of a link, is a file, or of another ``kind``."""
    try:
        return kind(path.lstat().st_mode)
    except OSError:
        return False


def _record(path: Path) -> Conversion | None:
    try:
        if not _is_plain(path) or path.stat().st_size > _LONGEST_RECORD:
            return None
        return parse_json(path.read_bytes(), Conversion)
    except (OSError, ValueError):
        return None


def _size(directory: Path) -> int:
    total = 0
    for place, _, files in os.walk(directory):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _lock_of(entry: Path) -> Path:
    return entry.with_name(f".{entry.name}.lock")


def _taken(entry: Path, file: str) -> bool:
    """Whether ``entry`` is whole. If so, other processes do not remove it until this process ends."""
    if fcntl is None:
        return _is_whole(entry)
    if str(entry) in _held:
        if _is_whole(entry):
            return True
        # Something else than this module removed it.
        os.close(_held.pop(str(entry)))
    try:
        try:
            descriptor = _locked(entry, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is dequantising {file}; waiting for it")
            descriptor = _locked(entry, fcntl.LOCK_SH)
    except OSError:
        # A cache that is read-only, or on a file system without locks, works all the same.
        return _is_whole(entry)
    if _is_whole(entry):
        _held[str(entry)] = descriptor
        return True
    os.close(descriptor)
    return False


@contextlib.contextmanager
def _exclusive(entry: Path, *, wait: bool = False) -> Iterator[bool]:
    """Keep others from using ``entry`` in the body. Yields False if it is in use, in this process or another one.

    Args:
        wait: Whether to wait until it is not in use.
    """
    if fcntl is None:
        yield True
        return
    try:
        descriptor = _locked(entry, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
        return
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        yield True
        return
    try:
        yield True
    finally:
        os.close(descriptor)


def _locked(entry: Path, operation: int) -> int:
    """Lock ``entry``, which may not exist. Returns the descriptor that holds the lock. Raises `OSError`."""
    path = _lock_of(entry)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, operation)
            # The process that held the lock before may have removed the file together with the entry.
            if os.path.lexists(path) and os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
