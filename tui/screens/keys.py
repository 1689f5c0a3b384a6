"""The keys of a screen, read from its bindings: for the key line, the help and the palette."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from textual.binding import Binding
from textual.keys import key_to_character

if TYPE_CHECKING:
    from textual.dom import DOMNode
    from textual.screen import Screen

KEY_NAMES = {
    "enter": "⏎",
    "escape": "esc",
    "up": "↑",
    "down": "↓",
    "left": "←",
    "right": "→",
    "slash": "/",
    "question_mark": "?",
    "comma": ",",
    "full_stop": ".",
    "left_square_bracket": "[",
    "right_square_bracket": "]",
    "colon": ":",
    "space": "␣",
    "plus": "+",
    "minus": "-",
    "pageup": "pgup",
    "pagedown": "pgdn",
}
HERE = "on this screen"
PURPOSES: dict[str, tuple[str, ...]] = {
    HERE: (),
    "look and sort": ("find", "find_next", "filter", "axis", "metric", "sort", "mark_column"),
    "move": ("move", "top", "bottom", "page", "scroll_columns", "scroll"),
    "go to": ("visit", "neighbour", "back", "escape", "scatter"),
    "marks": ("mark", "range", "mark_all", "undo", "redo", "write_marks", "measure"),
    "file and program": (
        *("copy", "export", "reload", "theme", "dump", "command_palette"),
        *("suspend_process", "interrupt", "quit", "help"),
    ),
}
"""Headings of the help, in order, to the names of their actions. Every action that no heading names is for its screen."""
_PURPOSE_OF = {action: purpose for purpose, actions in PURPOSES.items() for action in actions}
Piece = tuple[str, str]


@dataclass(frozen=True)
class KeyRow:
    """One action.

    Attributes:
        keys: The keys that run the action.
        word: What the key line says.
        sentence: What the help and the palette say.
        shown: Whether the key line has the action.
        action: The action, as a binding names it.
        node: The widget, screen or app that has the binding.
    """

    keys: tuple[str, ...]
    word: str
    sentence: str
    shown: bool
    action: str
    node: DOMNode


def key_rows(screen: Screen[Any]) -> list[KeyRow]:
    """Every documented action of ``screen``: its own first, then the focused widget's, then the app's."""
    rows: dict[tuple[str, int], KeyRow] = {}
    for active in screen.active_bindings.values():
        binding = active.binding
        if not binding.tooltip:
            continue
        key = (binding.action, id(active.node))
        earlier = rows[key].keys if key in rows else ()
        keys = (*earlier, key_name(binding.key))
        sentence = binding.tooltip.replace("{key}", keys[0])
        rows[key] = KeyRow(keys, binding.description, sentence, binding.show, binding.action, active.node)
    order = {id(screen): 1, id(screen.app): 3}

    def place(row: KeyRow) -> tuple[int, int]:
        # Textual puts actions with other keys last.
        declared = [binding.action for binding in declared_bindings(type(row.node))]
        at = declared.index(row.action) if row.action in declared else len(declared)
        # What a widget does with its screen is what the screen is for.
        return 0 if row.action.startswith("screen.") else order.get(id(row.node), 2), at

    return sorted(rows.values(), key=place)


@cache
def declared_bindings(node: type[Any]) -> tuple[Binding, ...]:
    """The bindings of the class ``node``: those of a class replace those that its parents have for the same key."""
    by_key: dict[str, Binding] = {}
    for base in reversed(node.__mro__):
        if base.__module__.startswith("tui."):
            by_key |= {binding.key: binding for binding in Binding.make_bindings(base.__dict__.get("BINDINGS", ()))}
    return tuple(by_key.values())


def key_name(key: str) -> str:
    """The key ``key`` as a person knows it."""
    character = key_to_character(key)
    return KEY_NAMES.get(key) or (character if character and character.isprintable() and character != " " else key)


def key_line(rows: list[KeyRow], width: int) -> list[Piece]:
    """The shown keys that fit in ``width`` cells. The last key, help, always fits."""
    words: dict[str, list[str]] = {}
    for row in rows:
        if row.shown:
            words.setdefault(row.word, []).append(row.keys[0])
    *others, last = [(" ".join(keys), word) for word, keys in words.items()]
    room = width - len(last[0]) - len(last[1]) - 2
    pieces: list[Piece] = [(" ", "")]
    for key, word in others:
        size = len(key) + 1 + len(word) + 2
        if size > room:
            break
        room -= size
        pieces += [(key, "key"), (f" {word}  ", "")]
    return [*pieces, (last[0], "key"), (f" {last[1]}", "")]


def help_lines(rows: list[KeyRow], width: int) -> list[list[Piece]]:
    """Keys and sentences under a heading for each purpose, in two columns, or in one if ``width`` has no room for two."""
    cells = width // 2 if width >= 70 else width
    keys_width = min(16, max(len(" ".join(row.keys)) for row in rows))
    room = cells - keys_width - 2
    lines: list[list[Piece]] = []
    for purpose in PURPOSES:
        entries = [row for row in rows if purpose_of(row) == purpose]
        if entries:
            lines.append([(f"{purpose:<{cells}}", "strong")])
        for row in entries:
            lines.append([(f"{' '.join(row.keys):>{keys_width}}", "key"), (f" {row.sentence[:room]:<{room}} ", "")])
    if cells == width:
        return lines
    depth = -(-len(lines) // 2)
    blank: list[Piece] = [(" " * cells, "")]
    return [[*left, *right] for left, right in zip_longest(lines[:depth], lines[depth:], fillvalue=blank)]


def purpose_of(row: KeyRow) -> str:
    """The heading of the help under which ``row`` stands."""
    return _PURPOSE_OF.get(row.action.partition("(")[0].rpartition(".")[2], HERE)
