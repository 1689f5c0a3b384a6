"""Atlases and apps that the tests of the browser share."""

from __future__ import annotations

import asyncio
import shutil
import time
from typing import TYPE_CHECKING

import pytest
from textual import events

from tests.factory import random_atlas
from tui.app import AtlasApp
from tui.load import read_snapshot
from tui.screens.base import BrowserScreen
from tui.screens.layer import LayerScreen

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from textual.pilot import Pilot


@pytest.fixture(scope="session")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty layers of 300 channels, so that both screens scroll."""
    return random_atlas(tmp_path_factory.mktemp("atlas") / "random.h5", layers=40, channels=300)


@pytest.fixture(scope="session")
def _four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_atlas(tmp_path_factory.mktemp("small") / "a.h5")


@pytest.fixture
def small(_four_layers: Path, tmp_path: Path) -> Path:
    """Four layers of 96 channels, this test's own to change."""
    return shutil.copy(_four_layers, tmp_path / "a.h5")


@pytest.fixture(autouse=True)
def _coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("TMUX", raising=False)


def open_app(path: Path) -> AtlasApp:
    return AtlasApp(read_snapshot(path))


def browser_screen(app: AtlasApp) -> BrowserScreen:
    """The screen in use, which has a table."""
    screen = app.screen
    assert isinstance(screen, BrowserScreen)
    return screen


def text_of(app: AtlasApp) -> str:
    """What the whole terminal shows."""
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
