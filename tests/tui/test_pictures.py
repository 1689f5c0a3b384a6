"""The scatter as a picture: what draws it, and what a terminal without pixels says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.widgets import Static

from tests.support.browsing import open_app, press, text_of, wait_until
from tui.screens.scatter import ScatterScreen
from tui.session.place import Place

if TYPE_CHECKING:
    from pathlib import Path


async def test_the_scatter_turns_into_a_picture_and_back(small: Path) -> None:
    app = open_app(small, Place("scatter", layer=1))
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        assert isinstance(app.screen, ScatterScreen)
        await press(pilot, "p")
        await pilot.pause()
        assert "pictures need" in text_of(app)
        # A PNG file says its width and height in bytes 16 to 23.
        app.picture_widget = lambda png: Static(f"{png[1:4].decode()} of {png[16:24].hex()}")
        await press(pilot, "p")
        await wait_until(lambda: f"PNG of {800:08x}{420:08x}" in text_of(app), 60)
        assert "┤" not in text_of(app)
        await press(pilot, "p")
        await wait_until(lambda: "┤" in text_of(app))
        assert "PNG of" not in text_of(app)
