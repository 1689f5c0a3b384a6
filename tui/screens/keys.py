"""The keys of a screen, read from its bindings: for the key line, the help and the palette."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
        name = KEY_NAMES.get(binding.key, binding.key)
        rows[key] = KeyRow((*earlier, name), binding.description, binding.tooltip, binding.show, binding.action, active.node)
    order = {id(screen): 0, id(screen.app): 2}
    first = getattr(screen, "KEYS_FIRST", ())
    return sorted(rows.values(), key=lambda row: -1 if row.word in first else order.get(id(row.node), 1))


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
        pieces += [(key, "strong"), (f" {word}  ", "")]
    return [*pieces, (last[0], "strong"), (f" {last[1]}", "")]


def help_lines(rows: list[KeyRow], width: int) -> list[list[Piece]]:
    """Keys and sentences in two columns, or in one column if ``width`` has no room for two."""
    columns = 2 if width >= 70 else 1
    cells = width // columns
    entries = [(" ".join(row.keys), row.sentence) for row in rows]
    keys_width = min(16, max(len(keys) for keys, _ in entries))
    depth = -(-len(entries) // columns)
    lines: list[list[Piece]] = []
    for line in range(depth):
        pieces: list[Piece] = []
        for keys, sentence in entries[line::depth]:
            room = cells - keys_width - 2
            pieces += [(f"{keys:>{keys_width}}", "strong"), (f" {sentence[:room]:<{room}} ", "")]
        lines.append(pieces)
    return lines
