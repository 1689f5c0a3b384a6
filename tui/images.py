"""Pictures in the terminal, if the package textual-image is installed and the terminal draws pixels (sixel, kitty)."""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from textual.widget import Widget

NEEDED = "pictures need pip install 'chanfmt[images]', and a terminal with sixel or kitty graphics"


def picture_widget() -> Callable[[bytes], Widget] | None:
    """What makes a widget of a PNG; None if the terminal cannot show it. This asks the terminal, so it comes before Textual starts."""
    if find_spec("textual_image") is None:
        return None
    try:
        # The import asks the terminal what it can draw, and how large its cells are.
        from textual_image import renderable, widget
    # A terminal may answer nothing or nonsense. The browser must start all the same.
    except Exception:
        return None
    if renderable.Image not in (renderable.SixelImage, renderable.TGPImage):
        return None

    def make(png: bytes) -> Widget:
        image: Widget = widget.Image(io.BytesIO(png))
        return image

    return make
