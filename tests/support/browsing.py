"""Drive the terminal browser as a user does, through Textual's pilot."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from textual import events

from tui.app import AtlasApp
from tui.screens.base import BrowserScreen
from tui.screens.layer import LayerScreen
from tui.session.load import read_snapshot
from tui.session.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from textual.pilot import Pilot

    from tui.session.place import Place


def open_app(path: Path, place: Place | None = None) -> AtlasApp:
    return AtlasApp(Session(read_snapshot(path), place=place))


def browser_screen(app: AtlasApp) -> BrowserScreen:
    """The screen in use, which has a table."""
    screen = app.screen
    assert isinstance(screen, BrowserScreen)
    return screen


def text_of(app: AtlasApp) -> str:
    """The characters of the whole terminal."""
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


async def press(pilot: Pilot[None], *keys: str) -> None:
    """Type ``keys`` without waiting between them, as a fast typist does, and let the app settle."""
    for key in keys:
        pilot.app.post_message(events.Key(key, key if len(key) == 1 else None))
    await pilot.pause()


async def in_layer(pilot: Pilot[None], app: AtlasApp, *keys: str) -> LayerScreen:
    """Type ``keys`` on the overview and open the layer under its cursor."""
    await press(pilot, *keys, "enter")
    await wait_until(lambda: isinstance(app.screen, LayerScreen))
    await pilot.pause()
    screen = app.screen
    assert isinstance(screen, LayerScreen)
    return screen


async def typed(pilot: Pilot[None], key: str, text: str) -> None:
    """Open the line with ``key``, clear it, type ``text`` and submit."""
    await press(pilot, key)
    await pilot.pause()
    # The input takes characters at once and other keys as bindings, later.
    await press(pilot, "end", *["backspace"] * 40)
    await press(pilot, *text)
    await press(pilot, "enter")
    await pilot.pause()


async def wait_until(predicate: Callable[[], bool], seconds: float = 10.0) -> None:
    """Let the app run until ``predicate`` holds."""
    end = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < end, "it never came true"
        await asyncio.sleep(0.01)
