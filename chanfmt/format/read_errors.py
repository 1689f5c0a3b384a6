"""Errors while a file is read: does the disk fail, or is the file damaged?"""

from __future__ import annotations

import errno
import os

from chanfmt.base.errors import AtlasError, first_line

COPY_AGAIN = "copy it again, or rebuild it"
_BY_CONTENT = (errno.EINVAL, errno.EOVERFLOW, errno.EFBIG)
"""Errors of the system that a file causes with an address that no file can have."""


class UnreadableError(AtlasError):
    """The system cannot read a file. This says nothing about what the file holds."""


def read_error(error: Exception, name: str) -> AtlasError:
    """The error to raise for ``error``, which came up while HDF5 opened or read the file.

    Args:
        name: What the message calls the file.
    """
    if isinstance(error, OSError) and error.errno and error.errno not in _BY_CONTENT:
        return UnreadableError(f"{name} cannot be read: {os.strerror(error.errno)}", hint="check the disk, and try again")
    return AtlasError(f"{name} is damaged: {first_line(error)}", hint=COPY_AGAIN, code="E001")
