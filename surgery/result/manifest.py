"""The files of a result, with sizes and SHA-256. They tell whether the result changed since it was checked."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

_THREADS = 4


@dataclass(frozen=True)
class FileRecord:
    """One file's size in bytes and SHA-256, in hexadecimal digits."""

    bytes: int
    sha256: str


Manifest = dict[str, FileRecord]
"""Path below the result's directory, with slashes, to `FileRecord`."""


def list_files(directory: Path) -> list[str]:
    """Every file below ``directory``, hidden ones too, sorted."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())


def hash_files(directory: Path, names: Iterable[str], progress: Callable[[int], object] = lambda count: None) -> Manifest:
    """The records of ``names`` below ``directory``, several files at a time. Raises OSError.

    Args:
        progress: Called with the number of bytes just read.
    """

    def record(name: str) -> FileRecord:
        digest, size = hashlib.sha256(), 0
        with (directory / name).open("rb", buffering=0) as stream:
            while part := stream.read(8 << 20):
                digest.update(part)
                size += len(part)
                progress(len(part))
        return FileRecord(size, digest.hexdigest())

    ordered = sorted(names)
    # hashlib releases the interpreter lock while it works.
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(ordered, pool.map(record, ordered), strict=True))
