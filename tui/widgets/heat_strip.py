"""Levels as a strip of colours, two samples a cell, or of glyphs."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from rich.color import Color
from rich.segment import Segment
from rich.style import Style

from tui.themes import GLYPH_RAMP

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np


class HeatStrip:
    """Turns levels into segments; styles are made once.

    Args:
        ramp: Colours low to high, or empty for the glyph ramp.
    """

    def __init__(self, ramp: Sequence[str]) -> None:
        self._colors = [Color.parse(color) for color in ramp]
        self._styles: dict[tuple[int, int, Style], Style] = {}

    @property
    def steps(self) -> int:
        """Highest level."""
        return len(self._colors) or len(GLYPH_RAMP) - 1

    @property
    def samples_per_cell(self) -> int:
        return 2 if self._colors else 1

    def segments(self, levels: np.ndarray, base: Style) -> list[Segment]:
        """``levels`` (cells * `samples_per_cell`,) over ``base``, where level 0 shows through."""
        if not self._colors:
            return [Segment("".join(GLYPH_RAMP[level] for level in levels.tolist()), base)]
        pairs = zip(levels[::2].tolist(), levels[1::2].tolist(), strict=True)
        return [
            Segment((" " if left == right else "▌") * len(list(run)), self._style(left, right, base))
            for (left, right), run in groupby(pairs)
        ]

    def _style(self, left: int, right: int, base: Style) -> Style:
        key = (left, right, base)
        if key not in self._styles:
            ground = base.bgcolor
            # A blank shows no foreground, and naming one costs 17 bytes a run.
            self._styles[key] = Style(
                color=None if left == right else self._colors[left - 1] if left else ground,
                bgcolor=self._colors[right - 1] if right else ground,
            )
        return self._styles[key]
