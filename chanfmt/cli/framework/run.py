"""Runs a command: its errors become one line and a hint, its outcome an exit code."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

from chanfmt.base import narrate
from chanfmt.base.command_line import recorded
from chanfmt.base.errors import ChanfmtError, first_line
from chanfmt.base.text import one_line
from chanfmt.cli.framework.streams import StdoutError, usable_streams

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Parse ``arguments`` (None: the arguments of the process), and call the command's function with the parsed arguments.

    Files that the command writes record its command line. SIGTERM interrupts it as Ctrl-C does.

    Returns:
        0 for success, 1 for a failure, 2 for wrong usage or bad input, 130 after Ctrl-C. The reader of stdout may go away
        (`atlas show ... | head`): that is a success.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    program = parser.prog
    with usable_streams():
        try:
            with _interruptible():
                return _run(parser, words)
        except ChanfmtError as error:
            _say(f"{program}: error: {error.message}", error.hint)
            return error.exit_code
        except KeyboardInterrupt as stop:
            # A command that keeps something says what it keeps.
            _say(f"{program}: interrupted; {str(stop) or 'nothing was left behind'}")
            return 130
        except MemoryError:
            _say(f"{program}: error: out of memory")
            return 1
        except StdoutError as error:
            if error.errno == errno.EPIPE:
                return 0
            _say(f"{program}: error: cannot write to stdout: {error}")
            return 1
        except OSError as error:
            where = "" if error.filename is None else f"{error.filename}: "
            _say(f"{program}: error: {where}{error.strerror or first_line(error)}")
            return 1


def _run(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    try:
        with recorded(parser.prog, words):
            namespace = parser.parse_args(words)
            run: Callable[[argparse.Namespace], int | None] = namespace.run
            with narrate.to_terminal(quiet=getattr(namespace, "quiet", False)):
                code = run(namespace) or 0
    except SystemExit:
        # --help and --version end like this.
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def _say(text: str, hint: str | None = None) -> None:
    print(one_line(text), file=sys.stderr)
    for line in (hint or "").splitlines():
        print(f"  {one_line(line.strip())}", file=sys.stderr)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM in the body, and on SIGINT if that would end the process (`chanfmt.base.start`).

    Off the main thread, where Python allows no handlers, do nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM, *([signal.SIGINT] if signal.getsignal(signal.SIGINT) is signal.SIG_DFL else [])]
    previous = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        yield
    finally:
        # A command that chose to ignore a signal has its reason until the process ends.
        for number, handler in previous.items():
            if signal.getsignal(number) is _interrupt:
                signal.signal(number, handler)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt
