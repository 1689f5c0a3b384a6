"""What every command line of the project shares: options from dataclasses, tables, errors, exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import signal
import sys
import types
import typing
from typing import Any, NoReturn, TypeVar

from chanfmt.base import narrate
from chanfmt.base.errors import ChanfmtError, UsageError
from chanfmt.base.text import format_table, json_text, printable
from chanfmt.base.version import __version__

if typing.TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Options = TypeVar("Options")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line and a hint, like every other error here."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see: {self.prog} --help")


def make_parser(program: str, description: str) -> tuple[Parser, argparse._SubParsersAction[Parser]]:
    """A command's parser with ``--version`` and its subcommands."""
    parser = Parser(prog=program, description=description)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser, parser.add_subparsers(metavar="COMMAND", required=True)


def add_options(parser: argparse.ArgumentParser, options: type[Any]) -> None:
    """One flag per field of the dataclass ``options``.

    Field metadata: ``help``; ``flag`` where it is not ``--field-name``; ``positional`` with a
    metavar; ``choices``; ``metavar``; ``repeat`` for a tuple filled by repeating the flag, in place of
    the default; ``nargs`` ``+`` for one filled by several arguments, ``?`` for an argument or none, which a flag
    then turns into an empty text. Fields without ``help`` are not options.
    """
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if "help" not in field.metadata:
            continue
        extra: dict[str, Any] = {"help": field.metadata["help"]}
        for name in ("metavar", "choices", "nargs"):
            if name in field.metadata:
                extra[name] = field.metadata[name]
        if "positional" in field.metadata:
            kind = _scalar_type(hints[field.name])
            if extra.get("nargs") == "?":
                extra["default"] = field.default
            parser.add_argument(field.name, metavar=field.metadata["positional"], type=kind, **extra)
            continue
        flags = [field.metadata.get("flag", "--" + field.name.replace("_", "-"))]
        if "short" in field.metadata:
            flags.insert(0, field.metadata["short"])
        if hints[field.name] is bool:
            parser.add_argument(*flags, dest=field.name, action="store_true", **extra)
            continue
        if extra.get("nargs") == "?":
            extra["const"] = ""
        default = None if field.default is dataclasses.MISSING else field.default
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        repeat = bool(field.metadata.get("repeat"))
        if default is not None and not (repeat and default == ()):
            shown = ", ".join(default) if isinstance(default, tuple) else default
            extra["help"] = f"{extra['help']} (default: {shown})"
        if repeat:
            # argparse would append to the default; `parse_options` fills it in.
            extra |= {"action": "append"}
            default = None
        parser.add_argument(
            *flags, dest=field.name, type=_scalar_type(hints[field.name]), default=default, required=required, **extra
        )


def parse_options(arguments: argparse.Namespace, options: type[Options]) -> Options:
    """Fill the dataclass ``options`` from parsed arguments."""
    values = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        if not hasattr(arguments, field.name):
            continue
        value = getattr(arguments, field.name)
        if "repeat" in field.metadata or field.metadata.get("nargs") == "+":
            value = tuple(value) if value else () if field.default is dataclasses.MISSING else field.default
        values[field.name] = value
    return options(**values)


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Parse, call the subcommand's ``run`` default, and turn its outcome into an exit code.

    Returns:
        0 success, 1 failure, 2 wrong usage or bad input, 130 after Ctrl-C.
    """
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        namespace = parser.parse_args(arguments)
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
        # A command that keeps something says what.
        print(f"{parser.prog}: interrupted; {printable(str(stop)) or 'nothing was left behind'}", file=sys.stderr)
        return 130
    except MemoryError:
        print(f"{parser.prog}: error: out of memory", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of stdout went away (`atlas show ... | head`); that is its choice.
        _discard_stdout()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _discard_stdout()
        print(f"{parser.prog}: error: the output's disk is full", file=sys.stderr)
        return 1
    finally:
        # A command that chose to ignore the signal has its reason until the process ends.
        if signal.getsignal(signal.SIGTERM) is _interrupt:
            signal.signal(signal.SIGTERM, previous)


def print_json(value: Any) -> None:
    """``value`` as one JSON document on stdout; numbers that are not finite become null."""
    print(json_text(value))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Rows under headings on stdout; text columns flush left, the others flush right."""
    print(format_table(headings, rows))


def _discard_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _scalar_type(hint: Any) -> Callable[[str], Any]:
    if isinstance(hint, types.UnionType):
        hint = next(member for member in typing.get_args(hint) if member is not type(None))
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    return hint if hint in (int, float) else str


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt
