"""The keys that a user has chosen, checked against the actions of all screens, as Textual's keymap."""

from __future__ import annotations

from functools import cache
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from textual.binding import Binding
from textual.keys import Keys as KnownKeys
from textual.keys import key_to_character

from chanfmt.base.choices import did_you_mean
from chanfmt.base.errors import UsageError
from chanfmt.base.text import one_line
from tui.screens.keys import declared_bindings
from tui.session.keys import MEND
from tui.session.registry import REGISTRY

if TYPE_CHECKING:
    from pathlib import Path

    from tui.session.keys import Keys

FIXED = frozenset(("escape", "up", "down", "left", "right", "home", "end", "ctrl+c", "ctrl+p", "ctrl+z", "tab", *"0123456789"))
"""Keys that always keep their meaning, so that nobody is locked in."""
MODIFIERS = ("ctrl+", "shift+", "alt+")


def keymap(keys: Keys, path: Path, app: type) -> dict[str, str]:
    """``keys`` as Textual's keymap: name of each action to its keys, separated by commas.

    Args:
        path: The file that ``keys`` came from.
        app: The class of the program, whose keys work on every screen.

    Raises:
        UsageError: An action or a key is unknown, or a key would have two meanings on one screen.
    """
    chains = {row.name: _chain(row.factory, app) for row in REGISTRY}
    known = sorted({binding.id for chain in chains.values() for binding in chain if binding.id})
    chosen: dict[str, list[str]] = {}
    for action, names in keys.items():
        if action not in known:
            raise UsageError(
                f"{path}: unknown action {action!r}{did_you_mean(action, known)}", hint=f"choose from {', '.join(known)}"
            )
        chosen[action] = [_key(name, action, path) for name in names]
    for screen, chain in chains.items():
        _check(chain, chosen, screen, path)
    return {action: ",".join(names) for action, names in chosen.items()}


def _key(name: str, action: str, path: Path) -> str:
    """Textual's name of the key ``name``, which may also be a character."""
    # Textual separates keys by commas.
    [binding] = Binding.make_bindings([Binding("comma" if "," in name else name.strip() or "space", "")])
    key = binding.key if name == "," or "," not in name else name
    plain = key
    while plain.startswith(MODIFIERS):
        plain = plain.partition("+")[2]
    if "," in key or not (plain in _known_keys() or key_to_character(plain)):
        raise UsageError(
            f"{path}: {action} has the unknown key {one_line(name)!r}",
            hint='keys are characters, such as "m" or "?", or names, such as "space", "enter", "f2", "ctrl+g"',
        )
    if key in FIXED:
        raise UsageError(f"{path}: {action} cannot have the key {one_line(name)!r}, which is fixed", hint=MEND)
    return key


@cache
def _known_keys() -> frozenset[str]:
    return frozenset(key.value for key in KnownKeys)


def _check(chain: list[Binding], chosen: dict[str, list[str]], screen: str, path: Path) -> None:
    """Raise `UsageError` if one of the ``chosen`` keys has two meanings in ``chain``."""
    meanings: dict[str, set[str]] = {}
    for binding in chain:
        name = binding.id or binding.action
        for key in chosen.get(name, [binding.key]):
            meanings.setdefault(key, set()).add(name)
    for key, names in meanings.items():
        if len(names) > 1 and any(key in chosen.get(name, ()) for name in names):
            first, second, *_ = sorted(names)
            raise UsageError(
                f"{path}: on the screen {screen}, {first} and {second} would have the same key {key}",
                hint=f"give another key to one of them; {MEND}",
            )


def _chain(factory: str, app: type) -> list[Binding]:
    """The bindings that work on a screen: those of its table, of the screen and of the program."""
    screen = resolve_name(factory)
    table = getattr(screen, "TABLE", None)
    return [binding for node in (table, screen, app) if node is not None for binding in declared_bindings(node)]
