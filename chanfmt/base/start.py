"""The start of a command line, before its modules are imported. This module imports next to nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def start(module: str) -> int:
    """Import ``module`` and call its ``main``. Returns the exit code, or ends the process if it was interrupted.

    Until `chanfmt.cli.framework.run_command` handles interrupts, and after that, Ctrl-C ends the process at once: a
    half-finished import would print a traceback. A caller that ignores Ctrl-C, such as ``nohup``, is obeyed.
    """
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        main: Callable[[], int] = import_module(module).main
    except KeyboardInterrupt:
        return INTERRUPTED
    code = main()
    if code == INTERRUPTED:
        # An interrupt can hit a pool between the start of a thread and its registration. Python would wait for it for ever.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    return code
