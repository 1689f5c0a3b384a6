"""Levels as a strip of colours, two samples per cell, or as a strip of glyphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.color import Color
from rich.segment import Segment
from rich.style import Style

from tui.widgets.themes import GLYPH_RAMP

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np


class HeatStrip:
    """Turns levels into segments, and caches the styles.

    Args:
        ramp: Colours from low to high; empty for glyphs.
    """

    def __init__(self, ramp: Sequence[str]) -> None:
        self._colors = [Color.parse(color) for color in ramp]
        self._styles: dict[tuple[int | None, int, Style], Style] = {}

    @property
    def steps(self) -> int:
        """Highest level."""
        return len(self._colors) or len(GLYPH_RAMP) - 1

    @property
    def samples_per_cell(self) -> int:
        return 2 if self._colors else 1

    def segments(self, levels: np.ndarray, base: Style) -> list[Segment]:
        """Segments for ``levels``, int (cells * `samples_per_cell`,). Level 0 shows ``base``."""
        if not self._colors:
            return [Segment("".join(GLYPH_RAMP[level] for level in levels.tolist()), base)]
        segments: list[Segment] = []
        text, fore, ground = "", None, -1
        for left, right in zip(levels[::2].tolist(), levels[1::2].tolist(), strict=True):
            needed = None if left == right else left
            # A blank shows no foreground, so it can share the style of a neighbouring half cell on the same background.
            if right != ground or (None not in (needed, fore) and needed != fore):
                if text:
                    segments.append(Segment(text, self._style(fore, ground, base)))
                text, fore, ground = "", None, right
            text += " " if needed is None else "▌"
            fore = fore if needed is None else needed
        return [*segments, Segment(text, self._style(fore, ground, base))]

    def _style(self, fore: int | None, ground: int, base: Style) -> Style:
        key = (fore, ground, base)
        if key not in self._styles:
            # A foreground that no cell shows would cost 17 bytes per run.
            self._styles[key] = Style(color=None if fore is None else self._color(fore, base), bgcolor=self._color(ground, base))
        return self._styles[key]

    def _color(self, level: int, base: Style) -> Color | None:
        return self._colors[level - 1] if level else base.bgcolor
