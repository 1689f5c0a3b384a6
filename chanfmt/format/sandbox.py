"""Run a function in a separate process with limits, so that a crash ends only that process.

HDF5 is a C library. A damaged or hostile file can make it crash, hang, or ask for any amount of memory. On
Linux the separate process is a fork, which costs a few milliseconds. On other systems the function runs here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SPARE_MEMORY = 1 << 30
CPU_SECONDS_PER_GIGABYTE = 60


class Crashed(Exception):
    """The work did not finish; the text says how it ended."""


def run_contained(work: Callable[[], str], *, size: int, cpu_seconds: int) -> str:
    """Run ``work`` with limits on memory and time that depend on the ``size`` of the file it reads. Returns its result.

    Args:
        size: Bytes of the file. ``work`` may use eight times as much memory, plus `SPARE_MEMORY`.
        cpu_seconds: Processor time that ``work`` may use, plus `CPU_SECONDS_PER_GIGABYTE` per gigabyte of the file.

    Raises:
        Crashed: A signal ended ``work``, it ran out of memory or time, or it raised an exception.
    """
    if sys.platform != "linux":
        return work()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(work, writer, size, cpu_seconds)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        raise Crashed("it took too much time" if number == signal.SIGXCPU else f"it was ended by {signal.Signals(number).name}")
    if os.WEXITSTATUS(status) == _NO_MEMORY:
        raise Crashed("it takes more memory than its size allows")
    text = answer.decode("utf-8", "surrogateescape")
    if os.WEXITSTATUS(status) == _SYSTEM_ERROR and text:
        raise Crashed(text)
    if os.WEXITSTATUS(status) != 0:
        raise Crashed("it ended without an answer")
    return text


_NO_MEMORY, _SYSTEM_ERROR = 3, 4


def _child(work: Callable[[], str], writer: int, size: int, cpu_seconds: int) -> None:
    """Run ``work``, write its result, and end the process. Does not return."""
    code = 1
    try:
        _limit(size, cpu_seconds)
        _answer(writer, work())
        code = 0
    except MemoryError:
        code = _NO_MEMORY
    except OSError as error:
        # A disk fails, not we. If this answer does not arrive either, the parent says that there was none.
        code = _SYSTEM_ERROR
        with contextlib.suppress(OSError):
            _answer(writer, error.strerror or str(error))
    except BaseException:
        # The traceback of our own mistakes should be seen, but the parent's cleanup must not run twice.
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _answer(writer: int, text: str) -> None:
    """Write ``text`` to the pipe ``writer``, and close it. Raises `OSError`."""
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(text.encode("utf-8", "surrogateescape"))


def _limit(size: int, cpu_seconds: int) -> None:
    import resource

    limits = {
        resource.RLIMIT_CPU: cpu_seconds + CPU_SECONDS_PER_GIGABYTE * (size >> 30),
        resource.RLIMIT_AS: mapped_memory() + 8 * size + SPARE_MEMORY,
        resource.RLIMIT_CORE: 0,
    }
    for which, value in limits.items():
        _, hard = resource.getrlimit(which)
        resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    # The parent process handles Ctrl-C, and SIGTERM, which some programs send to the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def mapped_memory() -> int:
    """Bytes of address space that this process uses already."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * os.sysconf("SC_PAGESIZE")
