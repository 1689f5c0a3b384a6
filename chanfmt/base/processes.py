"""The processes that torchrun, or another launcher that sets its variables, started for one command."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from chanfmt.base.errors import ChanfmtError

if TYPE_CHECKING:
    from collections.abc import Callable


def processes() -> int:
    """Number of processes that torchrun started for this command; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """Number of this process among the `processes`. The first process, 0, speaks and writes for all."""
    return int(os.environ["RANK"]) if processes() > 1 else 0


def outlive_others() -> None:
    """Let this process print its error: torchrun terminates it because the others have ended."""
    if processes() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def followed(work: Callable[[], object]) -> int:
    """Do ``work`` in a process that leaves all messages to the first one. Returns the exit code."""
    try:
        work()
    except ChanfmtError as error:
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0
