"""The start of a command line, before its modules are imported. This module imports next to nothing."""

from __future__ import annotations

import signal
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def start(module: str) -> int:
    """Import ``module`` and call its ``main``. Returns the exit code.

    Until `chanfmt.cli.framework.run_command` handles interrupts, and after that, Ctrl-C ends the process at once: a
    half-finished import would print a traceback. A caller that ignores Ctrl-C, such as ``nohup``, is obeyed.
    """
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        main: Callable[[], int] = import_module(module).main
    except KeyboardInterrupt:
        return 130
    return main()
