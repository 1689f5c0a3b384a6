"""What to type instead: arguments in each other's places, arguments too many, options that another command has."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import UsageError
from chanfmt.cli.framework.programs import OPTIONS, synonyms
from chanfmt.format.mistaken import looks_like

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence

_MOST = 4
"""Commands that an error names."""


def check_places(program: str, actions: Sequence[argparse.Action], values: argparse.Namespace) -> None:
    """Raise `UsageError` if two arguments seem to be in each other's places, such as an atlas and a model."""
    given = [(action, value) for action in actions for value in (_value(action, values),) if _kind(action) and value]
    for place, (first, value) in enumerate(given):
        for second, other in given[place + 1 :]:
            kinds = _kind(first), _kind(second)
            if kinds[0] != kinds[1] and (looks_like(other), looks_like(value)) == kinds:
                written = " ".join(_written(action, word) for action, word in ((first, other), (second, value)))
                raise UsageError(
                    f"{_name(first)} and {_name(second)} are in each other's places", hint=f"write: {program} {written} ..."
                )


def stray_hint(program: str, word: str, actions: Sequence[argparse.Action], values: argparse.Namespace) -> str | None:
    """How to write the command line if ``word`` is one argument too many; None if that is not clear."""
    kind = looks_like(word)
    free = [action for action in actions if action.option_strings and _value(action, values) is None and action.nargs is None]
    meant = next((action for action in free if kind and _kind(action) == kind), None)
    # A positional argument of another kind took the place of this word.
    for taken in (action for action in actions if not action.option_strings and _kind(action) == kind):
        other = _value(taken, values)
        home = next((action for action in free if other and _kind(action) == looks_like(other)), None)
        if home is not None and looks_like(other) != kind:
            return f"write: {program} {_written(taken, word)} {_written(home, other)} ..."
    meant = meant or next((action for action in free if _expected(action) and _takes(action, word)), None)
    if meant is None and kind == "name":
        meant = next((action for action in free if _kind(action) == "model"), None)
    if meant is None:
        return None
    before = [
        _written(action, _value(action, values)) for action in actions if not action.option_strings and _value(action, values)
    ]
    return f"write: {' '.join([program, *before, _written(meant, word)])} ..."


def missing(actions: Iterable[argparse.Action], values: argparse.Namespace) -> list[argparse.Action]:
    """The required arguments that were not given."""
    return [action for action in actions if action.required and getattr(values, action.dest, None) is None]


def missing_error(actions: Sequence[argparse.Action]) -> tuple[str, str]:
    """Message and hint if ``actions`` are missing."""
    names = [f"{_name(action)} {action.metavar}" if action.option_strings else _name(action) for action in actions]
    first = actions[0]
    return (
        f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing",
        f"add {names[0]}: {(first.help or '').replace('%%', '%')}",
    )


def elsewhere(option: str, known: Iterable[str], owners: Sequence[str]) -> str:
    """The end of an error about the unknown ``option``: who has it, or what it is called here; empty if nobody knows.

    Args:
        known: Options of the command.
        owners: Other commands of the program that have the option, as people type them.
    """
    same = [name for name in synonyms(option) if name in set(known)]
    if same:
        return f"; here it is called {same[0]}"
    if owners:
        more = "" if len(owners) <= _MOST else f" and {len(owners) - _MOST} more commands"
        return f"; it is an option of {', '.join(owners[:_MOST])}{more}"
    return f"; it is an option of {OPTIONS[option]}" if option in OPTIONS else ""


def _kind(action: argparse.Action) -> str:
    return getattr(action, "kind", None) or ""


def _expected(action: argparse.Action) -> bool:
    """Whether a word too many is likely to be the value of this option."""
    return action.required or bool(getattr(action, "main", False))


def _value(action: argparse.Action, values: argparse.Namespace) -> Any:
    value = getattr(values, action.dest, None)
    return value if isinstance(value, str) else None if value == action.default else value


def _takes(action: argparse.Action, word: str) -> bool:
    try:
        if callable(action.type):
            action.type(word)
    except (TypeError, ValueError):
        return False
    return True


def _name(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar)


def _written(action: argparse.Action, value: Any) -> str:
    words = [str(word) for word in value] if isinstance(value, list) else [str(value)]
    return shlex.join([*action.option_strings[:1], *words])
