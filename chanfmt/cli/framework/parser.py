"""A parser of command lines that starts fast, shows examples, and suggests a known word for a misspelt one."""

from __future__ import annotations

import argparse
import re
import shutil
from typing import TYPE_CHECKING, Any, NoReturn

from chanfmt.base.choices import did_you_mean, unknown
from chanfmt.base.errors import UsageError
from chanfmt.base.version import __version__
from chanfmt.cli.framework import mistakes
from chanfmt.cli.framework.completion import SHELLS, Node, script
from chanfmt.cli.framework.options import PrintOptions, add_options
from chanfmt.cli.framework.printing import print_line
from chanfmt.cli.framework.programs import COMMANDS, home_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

    Commands = argparse._SubParsersAction["Parser"]

_NEGATIVE = re.compile(r"-\d+$|-\d*\.\d+$")
"""Words that argparse takes as negative numbers, and not as options."""


_PERCENT = re.compile(r"invalid float value: '(\d+(?:\.\d+)?)%'$")
"""The end of argparse's message for a share that was written as a percentage."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and a hint, and whose options are added when they are needed.

    Long options are not abbreviated: a script must keep its meaning when a command gains an option.

    Args:
        fill: Adds the arguments. It is called before the first use, so its imports do not slow down other commands.
        examples: Command lines, printed at the end of ``--help``.
        printing: Add ``--json`` and ``--quiet``.
        version: Add ``--version``.
    """

    def __init__(
        self,
        *,
        fill: Callable[[Parser], None] | None = None,
        examples: Sequence[str] = (),
        printing: bool = True,
        version: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(add_help=False, allow_abbrev=False, formatter_class=_Formatter, **settings)
        self.examples = tuple(examples)
        self._fill: Callable[[Parser], None] | None = fill
        self._printing, self._version = printing, version
        self._filled = False
        self.siblings: Mapping[str, Parser] = {}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._complete()
        self._check_options(args or ())
        # argparse would complain about what is missing before what is wrong.
        needed = [action for action in self._actions if action.required and not isinstance(action, argparse._SubParsersAction)]
        for action in needed:
            action.required = False
        try:
            found, rest = super().parse_known_args(args, namespace)
        finally:
            for action in needed:
                action.required = True
        if needed or rest:
            mistakes.check_places(self.prog, self._actions, found)
        if rest:
            hint = mistakes.stray_hint(self.prog, rest[0], self._actions, found)
            raise UsageError(f"unexpected argument {rest[0]!r}", hint=hint or self._hint)
        if absent := mistakes.missing(needed, found):
            message, hint = mistakes.missing_error(absent)
            raise UsageError(message, hint=f"{hint}; {self._hint}")
        return found, rest

    def format_usage(self) -> str:
        self._complete()
        return super().format_usage()

    def format_help(self) -> str:
        self._complete()
        text = super().format_help()
        if not self.examples:
            return text
        width = shutil.get_terminal_size().columns - 2
        return text + "\nexamples:\n" + "".join(f"  {line}\n" for example in self.examples for line in _wrapped(example, width))

    def error(self, message: str) -> NoReturn:
        percent = _PERCENT.search(message)
        raise UsageError(message, hint=f"write {float(percent[1]) / 100:g} for {percent[1]}%" if percent else self._hint)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # Before Python 3.13, argparse drops the value of `--flag=--` and passes on an empty list.
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.dest == "output" and isinstance(value, str) and not value.strip():
            self.error(f"argument {'/'.join(action.option_strings)}: the name is empty")
        if action.choices is None or value in action.choices:
            return
        if isinstance(action, argparse._SubParsersAction):
            noun = str(action.metavar).lower()
            home = home_of(self.prog, str(value)) if self.prog in COMMANDS else ""
            if home:
                raise UsageError(f"{value} is a command of {home}", hint=f"write: {home} {value} ...")
            raise UsageError(f"unknown {noun} {value!r}{did_you_mean(str(value), action.choices)}", hint=self._hint)
        flag = action.option_strings[-1] if action.option_strings else action.metavar
        noun = getattr(action, "noun", None) or f"value of {flag}"
        raise unknown(noun, str(value), map(str, action.choices), hint=self._hint)

    @property
    def _hint(self) -> str:
        return f"see: {self.prog} --help"

    def _check_options(self, words: Sequence[str]) -> None:
        """Raise `UsageError` for an unknown option, before argparse complains about missing options."""
        for word in words:
            if word == "--":
                return
            if not word.startswith("-") or word == "-" or " " in word or _NEGATIVE.match(word):
                if self._subparsers is not None:
                    # The following words belong to the subcommand.
                    return
                continue
            name, known = word.partition("=")[0], self._option_string_actions
            if name not in known and (name.startswith("--") or name[:2] not in known):
                owners = [parser.prog for parser in self._relatives() if name in parser.known_options]
                if self._subparsers is not None and owners:
                    raise UsageError(
                        f"{name} is an option of commands", hint=f"write it after the command: {owners[0]} ... {name}"
                    )
                self.error(f"unknown option {name}{mistakes.elsewhere(name, known, owners) or did_you_mean(name, known)}")

    @property
    def actions(self) -> list[argparse.Action]:
        """The arguments."""
        self._complete()
        return self._actions

    @property
    def known_options(self) -> frozenset[str]:
        """The flags that the parser takes."""
        self._complete()
        return frozenset(self._option_string_actions)

    @property
    def commands(self) -> Mapping[str, Parser]:
        """Name of each subcommand to its parser."""
        self._complete()
        found = (action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction))
        return next(found, {})

    def _relatives(self) -> list[Parser]:
        """The other commands of the group that the parser is in; for a program or a group, its own commands."""
        group = self.siblings if self._subparsers is None else self.commands
        return [parser for parser in group.values() if parser is not self]

    def _complete(self) -> None:
        """Add the arguments, if this has not been done."""
        if self._filled:
            return
        self._filled = True
        if self._fill is not None:
            self._fill(self)
        group = add_options(self, PrintOptions) if self._printing else self.add_argument_group("options")
        if self._version:
            group.add_argument(
                "--version", action="version", version=f"%(prog)s {__version__}", help="print the version and exit"
            )
            group.add_argument(
                "--completion",
                action=_Completion,
                choices=SHELLS,
                metavar="SHELL",
                help=f"print what completes commands and options in a shell ({', '.join(SHELLS)}) and exit",
            ).noun = "shell"  # type: ignore[attr-defined]
        group.add_argument("-h", "--help", action="help", help="print this help and exit")
        if self.usage is None:
            self.usage = " ".join(["%(prog)s", *self._required()])

    def _required(self) -> Iterator[str]:
        """The parts of the usage line: positional arguments, required options, ``[options]``."""
        options = []
        for action in self._actions:
            name = str(action.metavar or action.dest.upper())
            if isinstance(action, argparse._SubParsersAction):
                yield f"{name} ..."
                return
            if not action.option_strings:
                yield {"+": f"{name}...", "*": f"[{name}...]", "?": f"[{name}]"}.get(str(action.nargs), name)
            elif action.required:
                options.append(f"{action.option_strings[0]} {name}")
        yield from options
        yield "[options]"


def make_parser(program: str, description: str) -> tuple[Parser, Commands]:
    """Make a program's parser, with ``--version`` and commands. Returns the parser, and what commands are added to."""
    parser = Parser(prog=program, description=description, printing=False, version=True)
    return parser, add_group(parser, "COMMAND")


def add_group(parser: Parser, noun: str) -> Commands:
    """Let ``parser`` have subcommands, which its help and its errors call ``noun``. Without a subcommand it prints its help."""
    parser.set_defaults(run=lambda arguments: parser.print_help())
    return parser.add_subparsers(title=f"{noun.lower()}s", metavar=noun, prog=parser.prog)


def add_command(
    commands: Commands,
    name: str,
    summary: str,
    *,
    run: Callable[[argparse.Namespace], int | None],
    options: Callable[[], Sequence[type[Any]]],
    examples: Sequence[str],
    description: str | None = None,
    **defaults: Any,
) -> None:
    """Add the command ``name``.

    Args:
        summary: Half a line for the list of commands.
        run: Runs it with the parsed arguments, and returns the exit code; None is 0.
        options: Returns the dataclasses of its groups of options, see `chanfmt.cli.framework.options.add_options`, in order.
            It is called only if the command is used, so it may import modules that other commands do not need.
        examples: Command lines for the end of its ``--help``.
        description: Sentences for its ``--help`` (default: the summary).
        defaults: Further attributes of the parsed arguments.
    """

    def fill(parser: Parser) -> None:
        for kind in options():
            add_options(parser, kind)

    description = description or f"{summary[0].upper()}{summary[1:]}."
    parser = commands.add_parser(name, help=summary, description=description, fill=fill, examples=examples)
    parser.siblings = commands.choices
    parser.set_defaults(run=run, **defaults)


class _Completion(argparse.Action):
    """Prints the completion script of a shell, and ends the program."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        def node(parser: Parser) -> Node:
            own = [action for action in parser.actions if action.option_strings]
            return Node(
                tuple(sorted(name for action in own for name in action.option_strings)),
                {
                    name: tuple(map(str, action.choices))
                    for action in own
                    if action.choices is not None
                    for name in action.option_strings
                },
                {name: (child.description or "", node(child)) for name, child in parser.commands.items()},
            )

        assert isinstance(parser, Parser)
        for line in script(str(values), parser.prog, node(parser)).splitlines():
            print_line(line, len(line))
        parser.exit()


class _Formatter(argparse.HelpFormatter):
    """Lists commands in one column, and the value of an option once for all its flags."""

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):
            return "".join(map(self._format_action, action._get_subactions()))
        return super()._format_action(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"

    def _iter_indented_subactions(self, action: argparse.Action) -> Generator[argparse.Action, None, None]:
        if isinstance(action, argparse._SubParsersAction):
            yield from action._get_subactions()


def _wrapped(command: str, width: int) -> Iterator[str]:
    """``command`` in lines of at most ``width`` characters that a shell reads as one."""
    line = ""
    # An option stays with its value.
    for part in re.findall(r"-\S+(?: [^-\s]\S*)*|\S+", command):
        if line and len(line) + len(part) + 5 > width:
            yield f"{line} \\"
            line = "    "
        line += part if not line.strip() else f" {part}"
    yield line
