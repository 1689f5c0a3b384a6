"""The file changes, disappears or is damaged while it is shown."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.support import browsed as atlases
from tests.support.browsing import browser_screen, in_layer, open_app, press, text_of, wait_until
from tests.support.factory import random_atlas
from tui.app import AtlasApp
from tui.screens.card import CardScreen
from tui.screens.layer import LayerScreen
from tui.screens.overview import OverviewScreen
from tui.screens.protect import ProtectScreen
from tui.screens.scatter import ScatterScreen
from tui.screens.what_if import WhatIfScreen
from tui.session.load import read_snapshot
from tui.session.session import Session
from tui.session.watch import Watcher
from tui.widgets.lines import Lines

if TYPE_CHECKING:
    from pathlib import Path


def status(app: AtlasApp) -> str:
    return browser_screen(app).query_one("#status", Lines).text


def replace(path: Path, **arguments: int) -> None:
    """Publish another atlas at ``path``, as every writer of the project does."""
    os.replace(random_atlas(path.with_name("next.h5"), **arguments), path)


def test_a_change_counts_when_two_looks_agree_and_only_once() -> None:
    watcher = Watcher((1, 1, 1))
    looks = [(1, 1, 1), (2, 5, 1), (2, 9, 1), (2, 9, 1), (2, 9, 1), (3, 9, 1), (2, 9, 1), (3, 9, 1), (3, 9, 1)]
    assert [watcher.changed(look) for look in looks] == [False] * 3 + [True] + [False] * 4 + [True]


async def test_polling_reads_a_replaced_file_and_keeps_the_place(small: Path) -> None:
    app = open_app(small)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("2", "j", "enter", "5", "j")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        await pilot.pause()
        screen = app.screen
        assert isinstance(screen, LayerScreen)
        channel, before = screen.table.channel, app.session.browser
        replace(small, seed=1)
        app.session.poll()
        assert app.session.browser is before
        app.session.poll()
        await wait_until(lambda: app.session.browser is not before)
        await pilot.pause()
        assert "read again" in status(app)
        assert (screen.table.ffn, screen.table.channel) == (2, channel)
        after = app.session.browser
        app.session.poll()
        app.session.poll()
        await pilot.press("q")
        await pilot.pause()
        assert app.session.browser is after
        assert browser_screen(app).table.cursor == 2


async def test_r_reads_now(small: Path) -> None:
    app = open_app(small)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(pilot, "j")
        replace(small, layers=6)
        await press(pilot, "r")
        await wait_until(lambda: browser_screen(app).table.row_count == 6)
        await pilot.pause()
        assert browser_screen(app).table.cursor == 1
        assert "read again" in status(app)


async def test_a_smaller_atlas_under_an_open_layer(small: Path) -> None:
    app = open_app(small)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("G", "enter", "G")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        replace(small, layers=2, channels=40)
        await pilot.press("r")
        await wait_until(lambda: len(app.session.browser.snapshot.ffns) == 2)
        await pilot.pause()
        screen = app.screen
        assert isinstance(screen, LayerScreen)
        assert (screen.table.ffn, screen.table.row_count) == (1, 40)
        await pilot.press("q")
        await wait_until(lambda: isinstance(app.screen, OverviewScreen))
        assert browser_screen(app).table.cursor == 1


@pytest.mark.parametrize("key", ["p", "w", "enter"])
async def test_ffns_in_front_move_no_cursor(key: str, tmp_path: Path) -> None:
    path = atlases.last_layers(tmp_path / "a.h5", 2)
    app = open_app(path)
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await in_layer(pilot, app, "j")
        await press(pilot, "5", "j")
        channel = screen.table.channel
        await press(pilot, key)
        await wait_until(lambda: isinstance(app.screen, ProtectScreen | WhatIfScreen | CardScreen))
        await pilot.pause()
        os.replace(random_atlas(tmp_path / "next.h5"), path)
        await press(pilot, *([] if key == "enter" else ["r"]))
        if key == "enter":
            app.action_reload()
        await wait_until(lambda: len(app.session.browser.snapshot.ffns) == 4)
        await app.workers.wait_for_complete()
        await pilot.pause()
        if key == "enter":
            assert "layer 3 ▸ channel" in text_of(app)
        else:
            assert browser_screen(app).ffn == 3
            assert browser_screen(app).table.cursor == 3
        await press(pilot, "q")
        await wait_until(lambda: app.screen is screen)
        assert (screen.ffn, screen.table.channel) == (3, channel)
        await press(pilot, "q")
        await wait_until(lambda: isinstance(app.screen, OverviewScreen))
        assert browser_screen(app).table.cursor == 3


@pytest.mark.parametrize(("key", "kind"), [("enter", CardScreen), ("x", ScatterScreen)])
async def test_card_and_scatter_are_read_again(key: str, kind: type, small: Path) -> None:
    app = open_app(small)
    async with app.run_test(size=(80, 36)) as pilot:
        layer = await in_layer(pilot, app)
        await press(pilot, key)
        await wait_until(lambda: isinstance(app.screen, kind))
        await pilot.pause()
        before = text_of(app)
        replace(small, seed=1)
        app.session.poll()
        app.session.poll()
        await wait_until(lambda: "read again" in text_of(app))
        rows = text_of(app).splitlines()
        if kind is CardScreen:
            value = app.session.browser.snapshot.values(0, "lp")[layer.table.channel]
            assert any(row.split()[:2] == ["lp", f"{value:#.4g}"] for row in rows)
        assert [row for row in rows if "read again" not in row][:15] != before.splitlines()[:15]
        small.unlink()
        app.session.poll()
        await pilot.pause()
        assert "still shown as read at" in text_of(app)


async def test_commands_name_the_file_that_is_finished(small: Path) -> None:
    partial = small.with_name("b.h5.partial")
    os.replace(small, partial)
    app = AtlasApp(Session(read_snapshot(partial), atlas_name=str(partial)))
    async with app.run_test(size=(80, 24)) as pilot:
        await press(pilot, "p")
        await wait_until(lambda: isinstance(app.screen, ProtectScreen))
        partial.unlink()
        finished = random_atlas(small.with_name("b.h5"), seed=1)
        app.session.poll()
        app.session.poll()
        await wait_until(lambda: app.session.browser.snapshot.path == finished)
        await press(pilot, "y", "D")
    assert app.clipboard.startswith(f"surgery prune {finished} ")
    assert app.return_value is not None
    assert app.return_value.startswith(f"# atlas-tui {finished} ")


async def test_a_metric_and_a_stack_that_went_away(tmp_path: Path) -> None:
    path = atlases.two_stacks(tmp_path / "a.h5")
    app = open_app(path)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("comma", "s", "m")
        await press(pilot, *"jjjjjjjjj", "enter")
        await wait_until(lambda: app.session.browser.metric == "redundancy")
        os.replace(atlases.without(tmp_path / "b.h5", "redundancy"), path)
        await pilot.press("r")
        await wait_until(lambda: app.session.browser.metric == "lp")
        await pilot.press("j", "s")
        assert browser_screen(app).table.row_count == 4


async def test_what_was_read_is_kept_when_the_file_goes_or_goes_bad(small: Path) -> None:
    app = open_app(small)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        before = app.session.browser
        small.unlink()
        app.session.poll()
        await pilot.pause()
        assert "still shown as read at" in status(app)
        assert "No such file" in status(app)
        small.write_text("not an atlas")
        app.session.poll()
        app.session.poll()
        await wait_until(lambda: "not an importance" in status(app))
        await press(pilot, "r", "j")
        assert app.session.browser is before
        assert browser_screen(app).table.cursor == 1


async def test_reading_while_the_file_is_rewritten_in_place(small: Path) -> None:
    whole = small.read_bytes()
    app = open_app(small)
    async with app.run_test(size=(80, 24)) as pilot:
        for part in range(20):
            small.write_bytes(whole[: len(whole) * part // 20])
            app.action_reload()
            await pilot.pause()
        small.write_bytes(whole)
        before = app.session.browser
        app.action_reload()
        await wait_until(lambda: app.session.browser is not before)
        await press(pilot, "j")
        assert browser_screen(app).table.cursor == 1
