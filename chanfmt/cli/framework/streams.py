"""The standard streams of a command: closed, full, broken, or of another encoding than UTF-8."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_STRICT = ("strict", "surrogateescape")
"""Ways of a stream to treat what its encoding lacks that may raise an error."""


class StdoutError(Exception):
    """A result could not be written to stdout.

    Args:
        error: Why not.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or str(error))
        self.errno = error.errno


@contextlib.contextmanager
def usable_streams() -> Iterator[None]:
    """Have streams in the body that commands can use, whatever the caller passed on.

    A closed stream is replaced by the null device: a file that is opened later would get its descriptor, and notes would end
    up in that file or in the results. Characters that the encoding of a stream lacks are written as escapes. A failed write
    raises `StdoutError` on stdout, and is passed over on stderr, where it could not be reported.
    """
    _open_descriptors()
    before = sys.stdout, sys.stderr
    out, err = (stream if stream is not None else _null() for stream in before)
    with _escaping(out), _escaping(err):
        sys.stdout, sys.stderr = _Checked(out), _Forgiving(err)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = (out if before[0] is None else before[0]), (err if before[1] is None else before[1])


def discard(stream: Any) -> None:
    """Send what is written to ``stream``, and what waits in its buffer, to the null device: Python writes it at exit."""
    # A stream of a test or a notebook has no descriptor.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)


class _Stream:
    """A stream with another treatment of failed writes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            written: int = self._stream.write(text)
        except OSError as error:
            self._failed(error)
            return len(text)
        return written

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        discard(self._stream)


class _Forgiving(_Stream):
    """Passes over failed writes."""


class _Checked(_Stream):
    """Raises `StdoutError` for failed writes."""

    def _failed(self, error: OSError) -> None:
        super()._failed(error)
        raise StdoutError(error) from None


def _open_descriptors() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free descriptor is used, and the lower ones are open.
            os.open(os.devnull, os.O_RDWR)


def _null() -> Any:
    return open(os.devnull, "w", encoding="utf-8")


@contextlib.contextmanager
def _escaping(stream: Any) -> Iterator[None]:
    """Let ``stream`` write characters that its encoding lacks as escapes in the body."""
    errors = getattr(stream, "errors", None)
    if errors not in _STRICT or not hasattr(stream, "reconfigure"):
        yield
        return
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            stream.reconfigure(errors=errors)
