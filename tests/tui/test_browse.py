"""Every key on both screens, at the design size and with the side panel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from textual.command import CommandList
from textual.widgets import Input

from tests.support.browsing import browser_screen, open_app, press, text_of, wait_until
from tui.screens.choice import ChoiceScreen
from tui.screens.help import HelpScreen
from tui.screens.layer import LayerScreen
from tui.screens.overview import OverviewScreen
from tui.widgets.lines import Lines

if TYPE_CHECKING:
    from pathlib import Path

    from tui.app import AtlasApp

SIZES = [(80, 24), (160, 50)]
sizes = pytest.mark.parametrize("size", SIZES)


def line(app: AtlasApp, name: str) -> str:
    return app.screen.query_one(f"#{name}", Lines).text


@sizes
async def test_overview_shows_every_layer_in_order(atlas: Path, size: tuple[int, int]) -> None:
    app = open_app(atlas)
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        screen = browser_screen(app)
        assert isinstance(screen, OverviewScreen)
        assert screen.table.row_count == 40
        shown = text_of(app).splitlines()
        assert len(shown) == size[1]
        assert all(len(row) == size[0] for row in shown)
        assert "random.h5" in shown[0]
        assert "40 layers × 300 ch" in shown[0]
        assert shown[1].split()[:5] == ["layer▴", "›mass", "top1%", "100%", "n_eff"]
        assert shown[2].startswith("▶")
        assert shown[-1].rstrip().endswith("? help")


@sizes
async def test_movement_keys(atlas: Path, size: tuple[int, int]) -> None:
    app = open_app(atlas)
    async with app.run_test(size=size) as pilot:
        table = browser_screen(app).table
        page = table.page_rows
        for keys, cursor in [
            ("j", 1),
            ("down", 2),
            ("k", 1),
            ("up", 0),
            ("k", 0),
            ("G", 39),
            ("j", 39),
            ("g", 0),
            ("end", 39),
            ("home", 0),
            ("1 2 j", 12),
            ("5 k", 7),
            ("1 5 G", 14),
            ("3 g", 2),
            ("0", 2),
            ("g ctrl+d", min(39, max(1, round(page / 2)))),
            ("ctrl+u", 0),
            ("pagedown", min(39, page)),
            ("pageup", 0),
        ]:
            await press(pilot, *keys.split())
            assert table.cursor == cursor, keys
            first = table.scroll_offset.y
            assert first <= table.cursor < first + page
        await press(pilot, "1", "0", "j")
        await press(pilot, "9")
        assert "count 9_" in line(app, "status")
        await press(pilot, "escape")
        assert "count" not in line(app, "status")
        await press(pilot, "9", "y", "j")
        assert table.cursor == 11, "a key that has no use for a count clears it"
        await press(pilot, "k")
        assert table.cursor == 10
        assert isinstance(app.screen, OverviewScreen)


async def test_a_count_before_enter_is_a_row(atlas: Path) -> None:
    app = open_app(atlas)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(pilot, "7", "enter")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        screen = app.screen
        assert isinstance(screen, LayerScreen)
        assert screen.ffn == 6
        await press(pilot, "5", "enter")
        await pilot.pause()
        assert screen.table.cursor == 4
        assert not screen.table.count


@pytest.mark.parametrize("size", [(80, 24), (110, 30), (160, 50)])
async def test_the_strip_marks_where_the_top_channels_end(atlas: Path, size: tuple[int, int]) -> None:
    app = open_app(atlas)
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        heading, row = text_of(app).splitlines()[1:3]
        table = browser_screen(app).table
        start = heading.index(" 1 ─") + 1
        cells = heading.index(" 300") + len(" 300") - start
        # Ranks are on a log axis from 1 to 301, and the top 1% of 300 channels are 3.
        assert heading[start:].index("┼1%") == int(cells * np.log(4) / np.log(301))
        assert len(heading) == len(row)
        assert table.row_count == 40


@sizes
async def test_columns_are_marked_sorted_and_scrolled(atlas: Path, size: tuple[int, int]) -> None:
    app = open_app(atlas)
    async with app.run_test(size=size) as pilot:
        screen = browser_screen(app)
        assert isinstance(screen, OverviewScreen)
        table = screen.table
        masses = np.array([item.concentration.mass for item in app.session.browser.summaries])
        await press(pilot, "s")
        await pilot.pause()
        assert masses[table.order].tolist() == sorted(masses, reverse=True)
        assert "mass▾" in text_of(app)
        await press(pilot, "S")
        await pilot.pause()
        assert masses[table.order].tolist() == sorted(masses)
        await press(pilot, "full_stop", "full_stop", "s")
        await pilot.pause()
        assert "›n_eff▾" in text_of(app)
        effective = [app.session.browser.summaries[ffn].concentration.effective_channels for ffn in table.order]
        assert effective == sorted(effective, reverse=True)
        await press(pilot, "2", "comma", "comma", "S")
        await pilot.pause()
        assert table.order.tolist() == list(range(40))
        await press(pilot, "l")
        assert "mass" not in [column.heading for column in table.shown_columns]
        await press(pilot, "h")
        assert "mass" in [column.heading for column in table.shown_columns]


@sizes
async def test_the_rows_below_are_counted(atlas: Path, size: tuple[int, int]) -> None:
    app = open_app(atlas)
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        table = browser_screen(app).table
        for key in ("", "G", "g", "pagedown", "2", "k"):
            await press(pilot, *([key] if key else []))
            await pilot.pause()
            below = table.row_count - table.scroll_offset.y - table.page_rows
            assert (below > 0) == (size == (80, 24) and key != "G")
            assert line(app, "legend").startswith(f" ⋮ {below} more  " if below > 0 else "  total")


@sizes
async def test_layer_screen_opens_walks_and_goes_back(atlas: Path, size: tuple[int, int]) -> None:
    app = open_app(atlas)
    async with app.run_test(size=size) as pilot:
        await press(pilot, "4", "j", "enter")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        await pilot.pause()
        assert "layer 4 " in line(app, "title")
        await press(pilot, "right_square_bracket")
        await pilot.pause()
        assert "layer 5 " in line(app, "title")
        await press(pilot, "3", "left_square_bracket")
        await pilot.pause()
        assert "layer 2 " in line(app, "title")
        await press(pilot, "9", "9", "left_square_bracket")
        await pilot.pause()
        assert "layer 0 " in line(app, "title")
        await press(pilot, "right_square_bracket", "q")
        await wait_until(lambda: isinstance(app.screen, OverviewScreen))
        assert browser_screen(app).table.cursor == 1
        await press(pilot, "enter")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        await press(pilot, "escape")
        await wait_until(lambda: isinstance(app.screen, OverviewScreen))
        await press(pilot, "escape")
        assert isinstance(app.screen, OverviewScreen)
        assert app.is_running


@sizes
async def test_layer_screen_ranks_by_lp_and_sorts_by_any_column(atlas: Path, size: tuple[int, int]) -> None:
    app = open_app(atlas)
    async with app.run_test(size=size) as pilot:
        await press(pilot, "enter")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        await pilot.pause()
        screen = app.screen
        assert isinstance(screen, LayerScreen)
        table = screen.table
        values = app.session.browser.snapshot.values(0, "lp")
        assert table.order.tolist() == np.argsort(-values, kind="stable").tolist()
        first = text_of(app).splitlines()[2]
        assert first.startswith("▶")
        assert first.split()[1:4] == ["1", str(int(values.argmax())), "SUPER"]
        taylor = app.session.browser.snapshot.values(0, "taylor")
        keys = [column.key for column in table.columns]
        steps = keys.index("taylor") - keys.index("lp")
        await press(pilot, *["full_stop"] * steps, "S")
        await pilot.pause()
        assert table.order.tolist() == np.argsort(taylor, kind="stable").tolist()
        assert "›taylor▴" in text_of(app)
        for key in keys:
            table.marked = key
            await press(pilot, "s")
            await pilot.pause()
            assert sorted(table.order.tolist()) == list(range(300))
            assert table.cursor == 0


@sizes
async def test_find_a_layer_and_a_channel(atlas: Path, size: tuple[int, int]) -> None:
    app = open_app(atlas)
    async with app.run_test(size=size) as pilot:
        await pilot.press("slash")
        await press(pilot, *"L31", "enter")
        await pilot.pause()
        assert browser_screen(app).table.cursor == 31
        await pilot.press("slash")
        await press(pilot, *"layers.12", "enter")
        await pilot.press("enter")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        await pilot.pause()
        screen = app.screen
        assert isinstance(screen, LayerScreen)
        assert screen.table.ffn == 12
        await pilot.press("n")
        assert "nothing to find" in line(app, "status")
        await pilot.press("slash")
        await press(pilot, *"217", "enter")
        await pilot.pause()
        assert screen.table.channel == 217
        labels = app.session.browser.snapshot.labels_of(12)
        await pilot.press("g", "slash")
        await press(pilot, *"halo", "enter")
        await pilot.pause()
        halo = np.flatnonzero(labels[screen.table.order] == 1)
        assert screen.table.cursor == halo[0]
        await pilot.press("n")
        assert screen.table.cursor == halo[1]
        await pilot.press("2", "n")
        assert screen.table.cursor == halo[3]
        await pilot.press("N")
        assert screen.table.cursor == halo[2]
        await pilot.press("slash")
        await press(pilot, *"xyz", "enter")
        await pilot.pause()
        assert "not found: xyz" in line(app, "status")
        assert screen.table.cursor == halo[2]
        await pilot.press("j")
        assert "not found" not in line(app, "status")


async def test_escape_closes_the_find_line_and_nothing_else(atlas: Path) -> None:
    app = open_app(atlas)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("enter")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        await pilot.press("slash", "q", "escape")
        await pilot.pause()
        assert isinstance(app.screen, LayerScreen)
        assert app.focused is browser_screen(app).table
        await pilot.press("j")
        assert browser_screen(app).table.cursor == 1


@sizes
async def test_metric_switch_holds_on_both_screens(atlas: Path, size: tuple[int, int]) -> None:
    app = open_app(atlas)
    async with app.run_test(size=size) as pilot:
        await press(pilot, "m")
        await wait_until(lambda: isinstance(app.screen, ChoiceScreen))
        await pilot.pause()
        assert "● LP" in text_of(app)
        await press(pilot, "j", "j", "enter")
        await wait_until(lambda: isinstance(app.screen, OverviewScreen))
        await pilot.pause()
        assert app.session.browser.metric == "activation_power"
        assert "act pow" in line(app, "title")
        power = app.session.browser.snapshot.values(0, "activation_power")
        assert app.session.browser.summaries[0].concentration.mass == pytest.approx(float(power.sum(dtype=np.float64)))
        await press(pilot, "enter")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        await pilot.pause()
        screen = app.screen
        assert isinstance(screen, LayerScreen)
        assert screen.table.channel == int(power.argmax())
        await press(pilot, "m")
        await wait_until(lambda: isinstance(app.screen, ChoiceScreen))
        await press(pilot, "g", "enter")
        await wait_until(lambda: app.screen is screen)
        await pilot.pause()
        assert app.session.browser.metric == "lp"
        assert screen.table.channel == int(power.argmax())
        assert screen.table.sort_key == "lp"
        await press(pilot, "m", "escape")
        await wait_until(lambda: app.screen is screen)
        assert app.session.browser.metric == "lp"


@sizes
async def test_axis_switch(atlas: Path, size: tuple[int, int]) -> None:
    app = open_app(atlas)
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        before = text_of(app)
        assert "rank, log" in before
        await press(pilot, "i")
        await pilot.pause()
        assert "channels by index" in text_of(app)
        await press(pilot, "i")
        await pilot.pause()
        assert text_of(app) == before


@sizes
async def test_help_is_made_from_the_bindings_in_two_columns(atlas: Path, size: tuple[int, int]) -> None:
    app = open_app(atlas)
    async with app.run_test(size=size) as pilot:
        await press(pilot, "question_mark")
        await wait_until(lambda: isinstance(app.screen, HelpScreen))
        await pilot.pause()
        screen = app.screen
        assert isinstance(screen, HelpScreen)
        shown = text_of(app)
        for row in screen.rows:
            assert row.sentence in shown, row
            assert " ".join(row.keys) in shown
        lines = shown.splitlines()
        first = next(each for each in lines if "on this screen" in each)
        assert first.strip("│ ") != "on this screen", "two columns"
        for purpose, sentence in (("look and sort", "choose the metric"), ("marks", "undo a mark"), ("file and program", "quit")):
            start = next(place for place, each in enumerate(lines) if purpose in each)
            assert any(sentence in each for each in lines[start:])
        await press(pilot, "question_mark")
        await wait_until(lambda: isinstance(app.screen, OverviewScreen))


async def test_layer_help_names_the_layer_keys(atlas: Path) -> None:
    app = open_app(atlas)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(pilot, "enter", "question_mark")
        await wait_until(lambda: isinstance(app.screen, HelpScreen))
        await pilot.pause()
        assert "previous layer" in text_of(app)
        await press(pilot, "q")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))


async def test_every_documented_action_exists(atlas: Path) -> None:
    app = open_app(atlas)
    async with app.run_test(size=(80, 24)) as pilot:
        for _ in range(2):
            names = [command.title for command in app.get_system_commands(app.screen)]
            assert len(names) == len(set(names)) > 20
            for active in app.screen.active_bindings.values():
                if active.binding.tooltip:
                    name = active.binding.action.partition("(")[0].rpartition(".")[2]
                    node = app if active.binding.action.startswith("app.") else active.node
                    assert hasattr(node, f"action_{name}"), active.binding
            await press(pilot, "enter")
            await pilot.pause()


@pytest.mark.parametrize("key", ["ctrl+p", "colon"])
async def test_palette_runs_an_action(atlas: Path, key: str) -> None:
    app = open_app(atlas)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(pilot, key)
        await wait_until(lambda: isinstance(app.focused, Input))
        palette = app.focused
        assert isinstance(palette, Input)
        assert not palette.cursor_blink
        await press(pilot, *"open the")
        commands = app.screen.query_one(CommandList)
        await wait_until(lambda: commands.option_count == 1)
        await press(pilot, "enter")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))


async def test_theme_list(atlas: Path) -> None:
    app = open_app(atlas)
    async with app.run_test(size=(80, 24)) as pilot:
        dark = app.ramp
        await press(pilot, "t")
        await wait_until(lambda: isinstance(app.screen, ChoiceScreen))
        await pilot.pause()
        assert f"● {app.theme}" in text_of(app)
        await press(pilot, "G", "enter")
        await wait_until(lambda: isinstance(app.screen, OverviewScreen))
        app.theme = "textual-light"
        await pilot.pause()
        assert app.ramp != dark
        await press(pilot, "j")


@sizes
async def test_copy_a_row(atlas: Path, size: tuple[int, int]) -> None:
    app = open_app(atlas)
    async with app.run_test(size=size) as pilot:
        await press(pilot, "j", "y")
        names, values = app.clipboard.rstrip("\n").split("\n")
        row = dict(zip(names.split("\t"), values.split("\t"), strict=True))
        assert row["layer"] == "1"
        assert float(row["mass"]) == app.session.browser.summaries[1].concentration.mass
        assert "copied" in line(app, "status")
        await press(pilot, "enter")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        await press(pilot, "y")
        names, values = app.clipboard.rstrip("\n").split("\n")
        row = dict(zip(names.split("\t"), values.split("\t"), strict=True))
        assert row["label"] == "supernode"
        assert np.float32(row["lp"]) == app.session.browser.snapshot.values(1, "lp").max()


@pytest.mark.parametrize("keys", ["q", "ctrl+c", "question_mark ctrl+c", "slash ctrl+c", "enter q q"])
async def test_quit(atlas: Path, keys: str) -> None:
    app = open_app(atlas)
    async with app.run_test(size=(80, 24)) as pilot:
        for key in keys.split():
            await press(pilot, key)
            await pilot.pause()
        await wait_until(lambda: not app.is_running)
    assert app.return_code == 0


async def test_mouse_does_what_the_keys_do(atlas: Path) -> None:
    app = open_app(atlas)
    async with app.run_test(size=(80, 24)) as pilot:
        screen = browser_screen(app)
        table = screen.table
        await pilot.click("#table", offset=(5, 4))
        assert table.cursor == 3
        await pilot.click("#table", offset=(12, 0))
        await pilot.pause()
        assert (table.sort_key, table.descending) == ("mass", True)
        await pilot.click("#table", offset=(12, 0))
        await pilot.pause()
        assert (table.sort_key, table.descending) == ("mass", False)
        await pilot.click("#table", offset=(5, 2))
        await pilot.click("#table", offset=(5, 2))
        await wait_until(lambda: isinstance(app.screen, LayerScreen))


async def test_no_size_breaks_it(atlas: Path) -> None:
    app = open_app(atlas)
    async with app.run_test(size=(80, 24)) as pilot:
        for size in [(20, 5), (1, 1), (40, 10), (110, 20), (300, 80)]:
            await pilot.resize_terminal(*size)
            for keys in [
                "j s 3 full_stop l",
                "enter",
                "G comma 7 full_stop S i",
                "question_mark",
                "escape",
                "slash",
                "1 enter",
                "m",
                "escape",
                "t",
                "escape",
                "q",
            ]:
                await press(pilot, *keys.split())
                shown = text_of(app).splitlines()
                assert [len(row) for row in shown] == [size[0]] * size[1], (size, keys)
            assert isinstance(app.screen, OverviewScreen)


async def test_resize_brings_the_panel_and_takes_it_away(atlas: Path) -> None:
    app = open_app(atlas)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        assert "Lorenz" not in text_of(app)
        await pilot.resize_terminal(160, 50)
        await wait_until(lambda: "Lorenz" in text_of(app) and "histogram" in text_of(app))
        await pilot.resize_terminal(80, 24)
        await wait_until(lambda: "Lorenz" not in text_of(app))


async def test_panel_follows_the_cursor(atlas: Path) -> None:
    app = open_app(atlas)
    async with app.run_test(size=(160, 50)) as pilot:
        await press(pilot, "3", "j")
        await pilot.pause()
        assert "model.layers.3.mlp" in line(app, "panel")
        await press(pilot, "enter", "j")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        await pilot.pause()
        screen = app.screen
        assert isinstance(screen, LayerScreen)
        assert f"channel {screen.table.channel:,}" in line(app, "panel")
