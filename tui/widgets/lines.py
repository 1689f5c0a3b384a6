"""A few lines of styled text that repaint only where they changed: title, status, keys, panel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

Line = Sequence[tuple[str, str | Style]]
"""Pieces of text, each with ``""``, ``strong``, ``dim``, ``super``, ``halo`` or a style of its own."""


class Lines(Widget):
    """Shows `Line`s from the top; what does not fit is cut."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"lines--strong", "lines--dim", "lines--super", "lines--halo"}
    DEFAULT_CSS = """
    Lines {
        height: 1;
        & > .lines--strong { color: $text-accent; text-style: bold; }
        & > .lines--dim { color: $text-muted; }
        & > .lines--super { color: $text-accent; }
        & > .lines--halo { color: $text-primary; }
    }
    """

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self._lines: list[Line] = []

    @property
    def text(self) -> str:
        """What is shown, without styles."""
        return "\n".join("".join(piece for piece, _ in line) for line in self._lines)

    def show(self, *lines: Line) -> None:
        """Replace all lines; only those that differ are painted again."""
        old, self._lines = self._lines, list(lines)
        changed = [
            Region(0, y, max(1, self.size.width), 1)
            for y in range(max(len(old), len(lines)))
            if (old[y] if y < len(old) else None) != (lines[y] if y < len(lines) else None)
        ]
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
