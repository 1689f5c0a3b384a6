"""Open an HDF5 file without a lock.

Published atlases are complete, and they are replaced by renaming, so a reader needs no lock. Some file systems have no
locks (NFS without its lock service, Lustre, read-only mounts), and a lock of another program must not stop a reader.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

import h5py
from h5py import h5f, h5fd, h5p

if TYPE_CHECKING:
    from pathlib import Path


class Unlocked(NamedTuple):
    """An open file.

    Attributes:
        file: The file as HDF5 sees it.
        descriptor: Descriptor of the open file.
        closing: Closes both.
    """

    file: h5py.File
    descriptor: int
    closing: contextlib.ExitStack


def open_unlocked(path: Path, *, write: bool = False) -> Unlocked:
    """Open the HDF5 file ``path`` for reading, or for reading and writing. No lock is taken.

    Python reads and writes the file on behalf of HDF5, which has no locks for such a file. A switch of HDF5 would do the same,
    but ``HDF5_USE_FILE_LOCKING`` overrules it, and no other library could then open the file in the same process with locks.

    Raises:
        OSError: The file cannot be opened, or HDF5 does not understand it.
    """
    flags = h5f.ACC_RDWR if write else h5f.ACC_RDONLY
    access = h5p.create(h5p.FILE_ACCESS)
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(path.open("r+b" if write else "rb", buffering=0))
        access.set_fileobj_driver(h5fd.fileobj_driver, raw)
        file = stack.enter_context(h5py.File(h5f.open(repr(raw).encode(), flags, access)))
        return Unlocked(file, raw.fileno(), stack.pop_all())
