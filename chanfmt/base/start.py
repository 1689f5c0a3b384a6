"""The start of a command line, before its modules are imported. This module imports next to nothing."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
FULL_SEARCHES = 1000
"""Searches of the young objects for unreachable ones before a search of all objects; Python's own number is 10."""


def start(module: str) -> int:
    """Import ``module`` and call its ``main``. Returns the exit code, or ends the process if it was interrupted.

    Until `chanfmt.cli.framework.run_command` handles interrupts, and after that, Ctrl-C ends the process at once: a
    half-finished import would print a traceback. A caller that ignores Ctrl-C, such as ``nohup``, is obeyed.

    The imports of torch and transformers make a million objects that stay. While their number grows, Python searches all of
    them for unreachable ones time and again, which takes a seventh of a command's start. So these searches are put off. The
    young objects are searched as ever.
    """
    gc.set_threshold(*gc.get_threshold()[:2], FULL_SEARCHES)
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
