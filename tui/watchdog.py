"""Signals that end the program, whatever its event loop does."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PATIENCE = 2.0
"""Seconds from a signal to the end of the process, if the program does not end by itself."""
# Mouse reports, bracketed paste, focus reports, keyboard protocol, resize reports off; line wrap on, main screen, cursor.
_RESTORE = b"\x1b[?1000l\x1b[?1003l\x1b[?1015l\x1b[?1006l\x1b[?2004l\x1b[?1004l\x1b[<u\x1b[?2048l\x1b[?7h\x1b[?1049l\x1b[?25h"


class Watchdog:
    """Ends the program on SIGTERM, SIGINT and SIGHUP in its context.

    The event loop cannot do this alone: a loop that is busy, or that waits for a disk, answers no signal. The C handler of
    Python writes the number of each signal to a pipe at once, and a thread reads it there. The thread asks the program to
    end. If it does not end in time, or a second signal comes, the thread restores the terminal and ends the process.

    Args:
        end: Asks the program to end with an exit code. It is called in the thread.
    """

    def __init__(self, end: Callable[[int], None]) -> None:
        self._end = end
        self._came = False
        self._terminal: list[Any] | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        import termios

        with contextlib.suppress(termios.error, OSError, ValueError, AttributeError):
            self._terminal = termios.tcgetattr(sys.__stdin__.fileno())  # type: ignore[union-attr]
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _seen) for number in NUMBERS}
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def __exit__(self, *error: object) -> None:
        if self._came:
            # The rest of the process, such as threads that wait for a disk, has to end in time too.
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)

    def _watch(self) -> None:
        number = self._next(None)
        if number is None:
            return
        self._came = True
        code = 128 + number
        # The loop may be closed already.
        with contextlib.suppress(Exception):
            self._end(code)
        self._next(PATIENCE)
        self._restore()
        os._exit(code)

    def _next(self, seconds: float | None) -> int | None:
        """The next signal that ends the program; None if none came in time, or if none is waited for any more."""
        while select.select([self._reader], [], [], seconds)[0]:
            data = os.read(self._reader, 1)
            if not data:
                return None
            if data[0] in NUMBERS:
                return data[0]
        return None

    def _restore(self) -> None:
        import termios

        # Writing in the background would stop the process.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        with contextlib.suppress(OSError, ValueError, AttributeError):
            descriptor = sys.__stderr__.fileno()  # type: ignore[union-attr]
            # A terminal that takes nothing must not hold the process.
            if select.select([], [descriptor], [], 0)[1]:
                os.write(descriptor, _RESTORE)
        if self._terminal is not None:
            with contextlib.suppress(termios.error, OSError, ValueError, AttributeError):
                termios.tcsetattr(sys.__stdin__.fileno(), termios.TCSANOW, self._terminal)  # type: ignore[union-attr]


def _seen(number: int, frame: FrameType | None) -> None:
    """Do nothing: the pipe has told the thread already."""
