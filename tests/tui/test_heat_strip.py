"""Heat strips: every sample in its colour, in few segments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from rich.color import Color
from rich.style import Style

from tui.widgets.heat_strip import HeatStrip
from tui.widgets.themes import DARK_RAMP, GLYPH_RAMP

if TYPE_CHECKING:
    from rich.segment import Segment

GROUND = Style(color="#c0c0c0", bgcolor="#102030")


def samples(segments: list[Segment]) -> list[int]:
    """Levels that a terminal would show, two per cell."""
    levels = [GROUND.bgcolor, *map(Color.parse, DARK_RAMP)]
    shown = []
    for text, style, _ in segments:
        assert style is not None
        for cell in text:
            shown += [levels.index(style.color if cell == "▌" else style.bgcolor), levels.index(style.bgcolor)]
    return shown


@pytest.mark.parametrize("seed", range(20))
def test_every_sample_has_its_colour(seed: int) -> None:
    levels = np.random.default_rng(seed).integers(0, 9, 60)
    if seed % 2:
        levels = np.sort(levels)[::-1]
    assert samples(HeatStrip(DARK_RAMP).segments(levels, GROUND)) == levels.tolist()


def test_a_falling_strip_has_a_segment_a_level() -> None:
    falling = np.repeat(np.arange(8, -1, -1), 5)[:44]
    assert len(HeatStrip(DARK_RAMP).segments(falling, GROUND)) == 9


def test_without_colours_there_are_glyphs() -> None:
    strip = HeatStrip(())
    [(text, style, _)] = strip.segments(np.arange(strip.steps + 1), GROUND)
    assert (text, style) == (GLYPH_RAMP, GROUND)
