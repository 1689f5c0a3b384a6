"""Colours that depend on the theme: the ramp of the heat strip, and the meaning of NO_COLOR."""

from __future__ import annotations

import os

DARK_RAMP = ("#00005f", "#5f0087", "#870087", "#af0087", "#d7005f", "#ff5f00", "#ffaf00", "#ffff87")
LIGHT_RAMP = ("#ffffd7", "#ffd787", "#ffaf00", "#ff5f00", "#d7005f", "#af0087", "#5f0087", "#00005f")
"""Eight colours from low to high. They are colours of the 256-colour cube, so every terminal shows eight different ones."""
GLYPH_RAMP = " .:-=+*#%@"
COLOURLESS_THEME = "ansi-dark"


def no_color() -> bool:
    """Whether the user asked for no colour: NO_COLOR is set and not empty (https://no-color.org)."""
    return bool(os.environ.get("NO_COLOR"))
