"""Validate in a process of its own, so that a file that breaks the HDF5 library breaks only that."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from chanfmt.errors import UsageError
from chanfmt.validate import validate
from chanfmt.validate.findings import Finding

if TYPE_CHECKING:
    from pathlib import Path

SPARE_MEMORY = 1 << 30
CPU_SECONDS = 60
CPU_SECONDS_PER_GIGABYTE = 60
_RECORD, _FIELD = "\x1e", "\x1f"


def validate_contained(path: Path) -> list[Finding]:
    """`chanfmt.validate.validate` with limits on memory and time; a crash is the finding E017.

    Where the platform cannot fork, it runs in this process.

    Raises:
        UsageError: There is no such file, or it cannot be opened at all.
    """
    if not hasattr(os, "fork"):
        return validate(path)
    try:
        size = path.stat().st_size
    except OSError:
        size = 0
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(path, size, writer)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read().decode("utf-8", "surrogateescape")
    finally:
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return [Finding("E017", "/", f"the reading process was ended by {name}")]
    kind, *records = answer.split(_RECORD)
    if kind == "usage":
        raise UsageError(records[0], hint=records[1] or None)
    if kind != "findings":
        return [Finding("E017", "/", "the reading process ended without an answer")]
    return [Finding(*record.split(_FIELD)) for record in records]


def _child(path: Path, size: int, writer: int) -> None:
    """Never returns."""
    code = 1
    try:
        _limit(size)
        try:
            findings = validate(path)
            records = [
                "findings",
                *(_FIELD.join(_plain(text) for text in (item.code, item.path, item.message)) for item in findings),
            ]
        except UsageError as error:
            records = ["usage", _plain(error.message), _plain(error.hint or "")]
        except MemoryError:
            records = ["findings", _FIELD.join(("E017", "/", "reading it takes more memory than its size allows"))]
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(_RECORD.join(records).encode("utf-8", "surrogateescape"))
        code = 0
    except BaseException:
        # The parent must see what went wrong here, and nothing of its own may run twice.
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _plain(text: str) -> str:
    return text.replace(_RECORD, " ").replace(_FIELD, " ")


def _limit(size: int) -> None:
    import resource

    # Arrays are read whole, a few at a time, some in double precision.
    limits = {
        resource.RLIMIT_CPU: CPU_SECONDS + CPU_SECONDS_PER_GIGABYTE * (size >> 30),
        resource.RLIMIT_AS: _mapped() + 8 * size + SPARE_MEMORY,
        resource.RLIMIT_CORE: 0,
    }
    for which, value in limits.items():
        _, hard = resource.getrlimit(which)
        resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _mapped() -> int:
    """Bytes of address space this process has already."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 8 << 30
