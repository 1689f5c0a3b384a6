"""Runs a command: its errors become one line and a hint, its outcome an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

from chanfmt.base import narrate
from chanfmt.base.command_line import recorded
from chanfmt.base.errors import ChanfmtError
from chanfmt.base.text import printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Parse ``arguments`` (None: the arguments of the process), and call the command's function with the parsed arguments.

    Files that the command writes record its command line. SIGTERM interrupts it as Ctrl-C does.

    Returns:
        0 for success, 1 for a failure, 2 for wrong usage or bad input, 130 after Ctrl-C.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    with _terminated_as_interrupted():
        try:
            with recorded(parser.prog, words):
                namespace = parser.parse_args(words)
                run: Callable[[argparse.Namespace], int | None] = namespace.run
                with narrate.to_terminal(quiet=getattr(namespace, "quiet", False)):
                    code = run(namespace) or 0
                sys.stdout.flush()
                return code
        except ChanfmtError as error:
            print(f"{parser.prog}: error: {printable(error.message)}", file=sys.stderr)
            if error.hint:
                print(f"  {printable(error.hint)}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt as stop:
            # A command that keeps something says what it keeps.
            print(f"{parser.prog}: interrupted; {printable(str(stop)) or 'nothing was left behind'}", file=sys.stderr)
            return 130
        except MemoryError:
            print(f"{parser.prog}: error: out of memory", file=sys.stderr)
            return 1
        except BrokenPipeError:
            # The reader of stdout went away (`atlas show ... | head`), which is not an error.
            _discard_stdout()
            return 0
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            _discard_stdout()
            print(f"{parser.prog}: error: the output's disk is full", file=sys.stderr)
            return 1


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM in the body. Off the main thread, where Python allows no handlers, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        # A command that chose to ignore the signal has its reason until the process ends.
        if signal.getsignal(signal.SIGTERM) is _interrupt:
            signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _discard_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
