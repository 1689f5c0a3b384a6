"""Colours that follow the theme: the heat strip's ramp, and what NO_COLOR means."""

from __future__ import annotations

import os

DARK_RAMP = ("#00005f", "#5f0087", "#870087", "#af0087", "#d7005f", "#ff5f00", "#ffaf00", "#ffff87")
LIGHT_RAMP = ("#ffffd7", "#ffd787", "#ffaf00", "#ff5f00", "#d7005f", "#af0087", "#5f0087", "#00005f")
"""Low to high. Exactly colours of the 256-colour cube, so that every terminal shows eight."""
GLYPH_RAMP = " .:-=+*#%@"
COLOURLESS_THEME = "ansi-dark"


def no_color() -> bool:
    """Whether the user asked for no colour (https://no-color.org: set and not empty)."""
    return bool(os.environ.get("NO_COLOR"))
