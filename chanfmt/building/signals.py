"""Ctrl-C and SIGTERM between the batches of a pass."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def stop_requests(*, quiet: bool = False) -> Iterator[Callable[[], bool]]:
    """Hold back Ctrl-C and SIGTERM in the body, and yield a function that says whether one came. A second one acts at once.

    The sums of a pass are consistent between two batches only. A signal that has no Python handler keeps its meaning. Off
    the main thread no signal is held back, because only the main thread may handle signals.

    Args:
        quiet: Whether nothing is printed when a signal comes.
    """
    came: list[int] = []
    previous: dict[int, Any] = {}

    def remember(number: int, frame: Any) -> None:
        if came:
            previous[number](number, frame)
        came.append(number)
        # Not through sys.stderr: the signal may have come in the middle of its work.
        with contextlib.suppress(OSError):
            if not quiet:
                os.write(2, b"\nstopping after this batch; once more stops at once\n")

    if threading.current_thread() is threading.main_thread():
        for wanted in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(wanted)
            if callable(handler):
                previous[wanted] = handler
                signal.signal(wanted, remember)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
