"""System calls that the kernel refuses, as some file systems refuse them.

A filter of system calls (seccomp) makes a call of this process return an error, whatever its arguments. A filter stays until the
process ends, so a test that needs one runs in a child.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import struct
import sys
import traceback
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Errors = Mapping[str, int]

_NUMBERS = {
    "x86_64": (
        0xC000003E,
        {"write": (1,), "flock": (73,), "pwrite64": (18,), "preadv": (295, 327), "link": (86, 265), "renameat2": (316,)},
    ),
    "aarch64": (
        0xC00000B7,
        {"write": (64,), "flock": (32,), "pwrite64": (68,), "preadv": (69, 286), "link": (37,), "renameat2": (276,)},
    ),
}
"""Machine to the kernel's name of it, and to the numbers of calls; ``link`` and ``preadv`` stand for both of their calls."""
NO_LOCKS: Errors = {"flock": errno.ENOLCK}
"""A file system without locks, such as NFS without its lock daemon."""
ONLY_LINK: Errors = {"renameat2": errno.EINVAL}
"""A file system that links, but does not know the flags of renameat2, such as NFS."""
NEITHER: Errors = {"renameat2": errno.EINVAL, "link": errno.EPERM}
"""A file system with neither call, such as FAT."""
_SKIPPED = 77


def refuse(errors: Errors) -> None:
    """Let each call in ``errors`` fail with its error until this process and its children end. Skips the test if that cannot be done."""
    if not errors:
        return
    if sys.platform != "linux" or platform.machine() not in _NUMBERS:
        pytest.skip("needs seccomp, which only Linux has")
    machine, numbers = _NUMBERS[platform.machine()]

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    load, jump_if_equal, answer, allow, fail = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000
    program = step(load, 4) + step(jump_if_equal, machine, 1) + step(answer, allow) + step(load, 0)
    for name, error in errors.items():
        for number in numbers[name]:
            program += step(jump_if_equal, number, 0, 1) + step(answer, fail | error)
    program += step(answer, allow)
    text = ctypes.create_string_buffer(program, len(program))
    filtering = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(text)))
    control = ctypes.CDLL(None, use_errno=True).prctl
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    if control(no_new_privileges, 1, 0, 0, 0) or control(set_seccomp, filter_mode, filtering, 0, 0):
        pytest.skip(f"may not filter system calls here: {os.strerror(ctypes.get_errno())}")


def in_child(work: Callable[[], object], errors: Errors) -> None:
    """Run ``work`` in a child process in which calls fail as in `refuse`. What it raises fails the test."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, told = 0, ""
        try:
            os.close(reader)
            refuse(errors)
            work()
        except pytest.skip.Exception as skipped:
            code, told = _SKIPPED, str(skipped)
        except BaseException:
            code, told = 1, traceback.format_exc()
        finally:
            os.writev(writer, [told.encode("utf-8", "backslashreplace")])
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == _SKIPPED:
        pytest.skip(told)
    if code:
        pytest.fail(f"in a child that ended with {code}:\n{told}", pytrace=False)


def on_file_systems(**kinds: Errors) -> Callable[[Callable[..., object]], Callable[..., None]]:
    """Run a test once for each of ``kinds``, in a child in which these calls fail. The test takes the name as ``kind``."""

    def decorate(test: Callable[..., object]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*arguments: Any, kind: str, **named: Any) -> None:
            in_child(lambda: test(*arguments, kind=kind, **named), kinds[kind])

        marked: Callable[..., None] = pytest.mark.parametrize("kind", kinds)(run)
        return marked

    return decorate
