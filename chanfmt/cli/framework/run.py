"""Runs a command: its errors become one line and a hint, its outcome an exit code."""

from __future__ import annotations

import _thread
import errno
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

from chanfmt.base import narrate
from chanfmt.base.command_line import recorded
from chanfmt.base.errors import ChanfmtError, MissingPackageError, first_line
from chanfmt.base.text import one_line
from chanfmt.cli.framework.options import RENAMED
from chanfmt.cli.framework.parser import Parser
from chanfmt.cli.framework.streams import StdoutError, usable_streams

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Parse ``arguments`` (None: the arguments of the process), and call the command's function with the parsed arguments.

    Files that the command writes record its command line. SIGTERM interrupts it as Ctrl-C does.

    Returns:
        0 for success, 1 for a failure, 2 for wrong usage or bad input, 130 after Ctrl-C. The reader of stdout may go away
        (`atlas show ... | head`): that is a success.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    interrupts = _Interrupts()
    with usable_streams():
        try:
            with interrupts:
                return _run(parser, words)
        # SystemExit of --help passes.
        except (Exception, KeyboardInterrupt) as error:
            code = _outcome(parser.prog, error, interrupted=interrupts.came)
            if code is None:
                raise
            return code


def _outcome(program: str, error: BaseException, *, interrupted: bool) -> int | None:
    """Say what ``error`` means. Returns the exit code; None for an error that only a traceback explains."""
    # Some packages report an interrupt during their import as a package that cannot be imported.
    if interrupted and not _is_ours(error) and not isinstance(error, KeyboardInterrupt):
        error = KeyboardInterrupt()
    if isinstance(error, ChanfmtError):
        _say(f"{program}: error: {error.message}", error.hint)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        # A command that keeps something says what it keeps.
        _say(f"{program}: interrupted; {str(error) or 'nothing was left behind'}")
        return 130
    if isinstance(error, MemoryError):
        _say(f"{program}: error: out of memory")
        return 1
    if isinstance(error, StdoutError):
        if error.errno == errno.EPIPE:
            return 0
        _say(f"{program}: error: cannot write to stdout: {error}")
        return 1
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{error.filename}: "
        _say(f"{program}: error: {where}{error.strerror or first_line(error)}")
        return 1
    return None


def _is_ours(error: BaseException) -> bool:
    return isinstance(error, ChanfmtError) and not isinstance(error, MissingPackageError)


def _run(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    try:
        with recorded(parser.prog, words):
            # People type `atlas help build` as they do after git.
            if words[:1] == ["help"] and isinstance(parser, Parser) and parser.commands:
                words = [*words[1:], "--help"]
            namespace = parser.parse_args(words)
            run: Callable[[argparse.Namespace], int | None] = namespace.run
            with narrate.to_terminal(quiet=getattr(namespace, "quiet", False)):
                for note in getattr(namespace, RENAMED, ()):
                    narrate.say(f"note: {note}")
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


class _Interrupts:
    """Raises KeyboardInterrupt in its context on SIGTERM, as on SIGINT.

    If SIGINT would end the process (`chanfmt.base.start`), or raise KeyboardInterrupt anyway, it is handled too. Off the main
    thread, where Python allows no handlers, nothing is handled.

    Attributes:
        came: Whether a signal came.
    """

    def __init__(self) -> None:
        self.came = False
        self._previous: dict[int, Any] = {}
        self._hook = sys.unraisablehook

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        wanted = [signal.SIGTERM]
        if signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler):
            wanted.append(signal.SIGINT)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._again
        for number in wanted:
            self._previous[number] = signal.signal(number, self._interrupt)

    def __exit__(self, *error: object) -> None:
        # A command that chose to ignore a signal has its reason until the process ends.
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._interrupt:
                signal.signal(number, handler)
        if sys.unraisablehook == self._again:
            sys.unraisablehook = self._hook

    def _interrupt(self, number: int, frame: Any) -> NoReturn:
        self.came = True
        raise KeyboardInterrupt

    def _again(self, unraisable: Any) -> None:
        """Interrupt once more if the first interrupt came in a destructor or a callback, where Python drops exceptions."""
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._hook(unraisable)
            return
        timer = threading.Timer(0.05, _thread.interrupt_main)
        timer.daemon = True
        timer.start()
