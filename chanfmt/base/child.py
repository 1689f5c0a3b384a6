"""How a command starts another command of chanfmt in a process of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_PR_SET_PDEATHSIG = 1

_ROOT = Path(__file__).resolve().parents[2]


def interpreter() -> list[str]:
    """Python, without modules of the working directory, unless chanfmt itself is run from there."""
    return [sys.executable] if Path.cwd() == _ROOT else [sys.executable, "-P"]


def ends_with_parent() -> Callable[[], None] | None:
    """What a child does first, as ``preexec_fn``: ask for SIGTERM if the thread that starts it ends, as when this process is killed.

    The thread must wait for the child. None where the system cannot do this: only Linux can.
    """
    if not sys.platform.startswith("linux"):
        return None
    parent = os.getpid()
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (OSError, AttributeError):
        return None

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return ask
