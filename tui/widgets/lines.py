"""A few lines of styled text that repaint only the cells that changed: title, status, keys, panel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import ClassVar

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

Line = Sequence[tuple[str, str | Style]]
"""Pieces of text, each with ``""``, ``strong``, ``dim``, ``key``, ``super``, ``halo``, ``lost``, or a style."""


class Lines(Widget):
    """Shows lines from the top, and cuts what does not fit."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {f"lines--{name}" for name in ("strong", "dim", "key", "super", "halo", "lost")}
    DEFAULT_CSS = """
    Lines {
        height: 1;
        & > .lines--strong { text-style: bold; }
        & > .lines--dim { color: $text-muted; }
        & > .lines--key { color: $text-success; text-style: bold; }
        & > .lines--super { color: $text-warning; }
        & > .lines--halo { color: $text-primary; }
        & > .lines--lost { color: $text-error; }
    }
    """

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self._lines: list[Line] = []

    @property
    def text(self) -> str:
        """The lines without styles."""
        return "\n".join("".join(piece for piece, _ in line) for line in self._lines)

    def show(self, *lines: Line) -> None:
        """Replace all lines; only cells that differ are painted again."""
        old, self._lines = self._lines, list(lines)
        changed = []
        for y, (before, after) in enumerate(zip_longest(old, lines, fillvalue=())):
            cells = difference(before, after, max(1, self.size.width))
            if cells:
                changed.append(Region(cells.start, y, len(cells), 1))
        if changed:
            self.refresh(*changed)

    def render_line(self, y: int) -> Strip:
        base = self.rich_style
        width = self.size.width
        pieces = self._lines[y] if y < len(self._lines) else ()
        strip = Strip([Segment(text, self._piece_style(base, style)) for text, style in pieces])
        return strip.adjust_cell_length(width, base)

    def _piece_style(self, base: Style, name: str | Style) -> Style:
        if isinstance(name, Style):
            return name
        return self.get_component_rich_style(f"lines--{name}") if name else base


def difference(before: Line, after: Line, width: int) -> range:
    """The cells, out of ``width``, that contain every difference between two lines."""
    if before == after:
        return range(0)
    old, new = ([(character, style) for text, style in line for character in text] for line in (before, after))
    if any(cell_len(character) != 1 for character, _ in (*old, *new)):
        return range(width)
    differing = [x for x, (one, other) in enumerate(zip_longest(old, new)) if one != other]
    return range(differing[0], min(width, differing[-1] + 1)) if differing and differing[0] < width else range(0)
