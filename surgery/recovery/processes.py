"""Several processes that torchrun started for one cut: what each of them does. Only ``--recover distill`` uses more than one."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from chanfmt.base.errors import ChanfmtError, UsageError
from chanfmt.base.narrate import LOGGER, silenced
from chanfmt.base.processes import followed, outlive_others, processes, rank
from surgery.recovery.options import Refit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from surgery.recovery.options import Recovery


class HelpedError(ChanfmtError):
    """This process has done its part of the work, and the first process has the result. It is not a failure."""

    exit_code = 0


def check_processes(recovery: Recovery | None) -> None:
    """Raise `UsageError` if torchrun started several processes and a cut with ``recovery`` runs in one."""
    if processes() > 1 and not (isinstance(recovery, Refit) and recovery.method == "distill"):
        raise UsageError(
            f"{processes()} processes were started, and only --recover distill uses several",
            hint="run the command without torchrun, or with --recover distill",
        )


def run_command(command: Callable[[], None]) -> int:
    """Run ``command`` in this process, and return its exit code. Only the first of several processes prints.

    Raises:
        ChanfmtError: As ``command``, in the first process.
    """
    if rank() == 0:
        try:
            command()
        except ChanfmtError:
            outlive_others()
            raise
        return 0
    with _mute():
        return followed(command)


@contextlib.contextmanager
def _mute() -> Iterator[None]:
    with silenced():
        LOGGER.setLevel(logging.CRITICAL)
        yield
