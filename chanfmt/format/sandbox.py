"""Run a piece of work in a process of its own, with limits: what breaks there breaks only that.

HDF5 is a C library, and a damaged or hostile file can make it crash, hang, or ask for any amount of
memory. On Linux the process is forked, which costs a few milliseconds; elsewhere the work runs here.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SPARE_MEMORY = 1 << 30
CPU_SECONDS_PER_GIGABYTE = 60


class Crashed(Exception):
    """The work did not come to an end of its own; the text says how it ended."""


def run_contained(work: Callable[[], str], *, size: int, cpu_seconds: int) -> str:
    """The result of ``work``, whose memory and time are limited by the ``size`` of the file it reads.

    Args:
        size: Bytes of the file: ``work`` may use eight times that and `SPARE_MEMORY`.
        cpu_seconds: Processor time it may use, and `CPU_SECONDS_PER_GIGABYTE` more for each of the file's.

    Raises:
        Crashed: It was ended by a signal, ran out of memory or time, or raised an exception.
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
    if os.WEXITSTATUS(status) != 0:
        raise Crashed("it ended without an answer")
    return answer.decode("utf-8", "surrogateescape")


_NO_MEMORY = 3


def _child(work: Callable[[], str], writer: int, size: int, cpu_seconds: int) -> None:
    """Never returns."""
    code = 1
    try:
        _limit(size, cpu_seconds)
        answer = work().encode("utf-8", "surrogateescape")
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(answer)
        code = 0
    except MemoryError:
        code = _NO_MEMORY
    except BaseException:
        # A mistake of ours should be seen, but nothing of the parent's may run twice.
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


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
    # Ctrl-C is the parent's to answer.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def mapped_memory() -> int:
    """Bytes of address space this process has already."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * os.sysconf("SC_PAGESIZE")
