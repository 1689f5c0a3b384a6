"""Options of a command line, from dataclasses and back into them."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

if typing.TYPE_CHECKING:
    from collections.abc import Callable

Options = TypeVar("Options")
RENAMED = "renamed_options"
"""Name of the parsed attribute that holds notes about options under an earlier name."""
TOKENIZER_MODEL = {
    "help": "model whose tokenizer gives the texts of tokens: a local directory, a .gguf file that was used before, or a Hub "
    "id in the cache (default: the model that the atlas names, if it is on this machine)",
    "metavar": "MODEL",
}
"""The metadata of the option ``--model`` of commands that print tokens."""
_NUMBERS: dict[Any, str] = {int: "N", float: "X"}
"""Names of values in the help, if the metadata does not name them."""


@dataclass(frozen=True)
class PrintOptions:
    """What is printed."""

    json: bool = field(default=False, metadata={"help": "print the result as JSON"})
    quiet: bool = field(default=False, metadata={"help": "print no progress and no notes"})


def add_options(parser: argparse.ArgumentParser, options: type[Any]) -> argparse._ArgumentGroup:
    """Add a group of arguments, titled by the first line of the docstring of the dataclass ``options``.

    Each field with ``help`` in its metadata is an argument. Other metadata:

    * ``flag``: the flag, if it is not ``--field-name``; ``short``: a second flag, such as ``-o``.
    * ``positional``: the argument has no flag, and is shown by this name.
    * ``metavar``: the name of the value.
    * ``choices``: the values allowed; ``noun``: what an error calls a value (default: a value of the flag).
    * ``kind``: what the value is (``atlas``, ``model``, ``plan``, ``result``, ``name``), as
      `chanfmt.format.mistaken.looks_like` says it, so that arguments in each other's places are noticed.
    * ``main``: a value too many on the command line is likely to be meant for this option.
    * ``formerly``: an earlier flag of a repeated option, which still works, with a note.
    * ``repeat``: the flag may be repeated, and the values replace the default of the tuple.
    * ``nargs``: ``+`` for a tuple of one or more values, ``*`` for a tuple of any number of values; ``?`` for an optional value, which is an empty text if the flag
      comes without one.
    """
    group = parser.add_argument_group(_title(options))
    hints = typing.get_type_hints(options)
    # A dataclass inherits the fields of its base first, but readers look for the arguments without a flag first.
    for item in sorted(dataclasses.fields(options), key=lambda item: "positional" not in item.metadata):
        if "help" in item.metadata:
            _add_option(group, item, hints[item.name])
    return group


def parse_options(arguments: argparse.Namespace, options: type[Options]) -> Options:
    """Fill the dataclass ``options`` from parsed arguments."""
    values = {}
    for item in dataclasses.fields(options):  # type: ignore[arg-type]
        if not hasattr(arguments, item.name):
            continue
        value = getattr(arguments, item.name)
        if "repeat" in item.metadata or item.metadata.get("nargs") in ("+", "*"):
            value = tuple(value) if value else () if item.default is dataclasses.MISSING else item.default
        values[item.name] = value
    return options(**values)


def _add_option(group: argparse._ArgumentGroup, item: dataclasses.Field[Any], hint: Any) -> None:
    metadata = item.metadata
    extra: dict[str, Any] = {name: metadata[name] for name in ("help", "metavar", "choices", "nargs") if name in metadata}
    if "positional" in metadata:
        if extra.get("nargs") == "?":
            extra["default"] = item.default
        action = group.add_argument(item.name, **extra | {"metavar": metadata["positional"], "type": _scalar_type(hint)})
    else:
        flags = [metadata.get("flag", "--" + item.name.replace("_", "-"))]
        if "short" in metadata:
            flags.insert(0, metadata["short"])
        if hint is bool:
            action = group.add_argument(*flags, dest=item.name, action="store_true", **extra)
        else:
            action = group.add_argument(*flags, dest=item.name, **extra | _valued(item, hint))
            if "formerly" in metadata:
                group.add_argument(
                    metadata["formerly"], dest=item.name, action=_Formerly, now=flags[-1], help=argparse.SUPPRESS, default=None
                )
    action.noun = metadata.get("noun")  # type: ignore[attr-defined]
    action.kind = metadata.get("kind")  # type: ignore[attr-defined]
    action.main = metadata.get("main", False)  # type: ignore[attr-defined]


class _Formerly(argparse.Action):
    """An option that has another name now. The command says so when it runs."""

    def __init__(self, *arguments: Any, now: str, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.now = now

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), values])
        notes = getattr(namespace, RENAMED, ())
        setattr(namespace, RENAMED, tuple(dict.fromkeys([*notes, f"{option_string} of {parser.prog} is now called {self.now}"])))


def _valued(item: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """Arguments of `argparse.ArgumentParser.add_argument` for a flag with a value."""
    missing = item.default is dataclasses.MISSING
    extra: dict[str, Any] = {
        "type": _scalar_type(hint),
        "default": None if missing else item.default,
        "required": missing and item.default_factory is dataclasses.MISSING,
    }
    if item.metadata.get("nargs") == "?":
        extra["const"] = ""
    if not {"metavar", "choices"} & item.metadata.keys():
        extra["metavar"] = _NUMBERS.get(extra["type"]) or item.metadata.get("flag", item.name).strip("-").upper()
    if extra["default"] not in (None, (), ""):
        shown = ", ".join(item.default) if isinstance(item.default, tuple) else item.default
        extra["help"] = f"{item.metadata['help']} (default: {shown})"
    if item.metadata.get("repeat"):
        # argparse would append to the default, so `parse_options` fills it in.
        extra |= {"action": "append", "default": None}
    return extra


def _title(options: type[Any]) -> str:
    line = (options.__doc__ or "options").strip().splitlines()[0].rstrip(".")
    return line if line[1:2].isupper() else line[:1].lower() + line[1:]


def _scalar_type(hint: Any) -> Callable[[str], Any]:
    if isinstance(hint, types.UnionType):
        hint = next(member for member in typing.get_args(hint) if member is not type(None))
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    return hint if hint in (int, float) else str
