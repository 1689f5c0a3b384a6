"""Two atlases: every key of the compare and join screens, and the numbers of `atlas compare`."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest

from chanfmt.cli.main import main as atlas_main
from tests.support import browsed as atlases
from tests.support.browsing import browser_screen, open_app, press, text_of, typed, wait_until
from tests.support.factory import moe_atlas, random_atlas
from tui.app import AtlasApp
from tui.cli import main
from tui.screens.choice import ChoiceScreen
from tui.screens.compare import CompareScreen
from tui.screens.join import JoinScreen
from tui.screens.overview import OverviewScreen
from tui.screens.protect import ProtectScreen
from tui.session.load import read_snapshot
from tui.session.place import Place
from tui.session.session import Session
from tui.widgets.compare_table import BAR
from tui.widgets.lines import Lines

if TYPE_CHECKING:
    from pathlib import Path

    from textual.pilot import Pilot

sizes = pytest.mark.parametrize("size", [(80, 24), (160, 50)])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Six layers of 400 channels, measured on different sequences."""
    folder = tmp_path_factory.mktemp("pair")
    first, second = (
        random_atlas(folder / f"{name}.h5", layers=6, channels=400, calibration_seed=seed)
        for seed, name in enumerate(("one", "two"))
    )
    return first, second


def app_of(pair: tuple[Path, Path]) -> AtlasApp:
    return AtlasApp(Session(read_snapshot(pair[0]), other=read_snapshot(pair[1])))


async def compared(app: AtlasApp) -> CompareScreen:
    await wait_until(lambda: isinstance(app.screen, CompareScreen) and app.screen.table.row_count > 0)
    screen = app.screen
    assert isinstance(screen, CompareScreen)
    return screen


async def joined(pilot: Pilot[None], app: AtlasApp) -> JoinScreen:
    await press(pilot, "enter")
    await wait_until(lambda: isinstance(app.screen, JoinScreen))
    await pilot.pause()
    screen = app.screen
    assert isinstance(screen, JoinScreen)
    return screen


@sizes
async def test_the_numbers_are_those_of_atlas_compare(
    pair: tuple[Path, Path], size: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert atlas_main(["compare", *map(str, pair), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    app = app_of(pair)
    async with app.run_test(size=size) as pilot:
        screen = await compared(app)
        await pilot.pause()
        rows = text_of(app).splitlines()[2:8]
        for row, expected in zip(rows, layers, strict=True):
            cells = row.replace("▶", " ").replace("━", " ").replace("│", " ").split()
            assert cells[0] == str(expected["layer"])
            assert cells[4] == f"{expected['correlation']:.2f}"
            assert [int(cell) for cell in cells[5:8]] == [
                expected["supernodes_shared"],
                expected["supernodes_first"] - expected["supernodes_shared"],
                expected["supernodes_second"] - expected["supernodes_shared"],
            ]
        first = app.session.browser.summaries[0].concentration.top_share
        assert rows[0].replace("▶", " ").split()[1] == f"{100 * first:.1f}%"
        changes = [second - first for first, second in map(screen.table.comparison.top_shares, range(len(layers)))]
        # The largest change fills its bar, and every other bar is in proportion to it.
        largest = max(map(abs, changes))
        assert [row.count("━") for row in rows] == [round(BAR * abs(change) / largest) for change in changes]
        for column in screen.table.columns:
            screen.table.marked = column.key
            await press(pilot, "s")
            values = screen.table._sort_values()[screen.table.order]
            known = values[~np.isnan(values.astype(float))]
            assert known.tolist() == sorted(known, reverse=True), column


@sizes
async def test_every_key_of_the_compare_screen(pair: tuple[Path, Path], size: tuple[int, int]) -> None:
    app = app_of(pair)
    async with app.run_test(size=size) as pilot:
        screen = await compared(app)
        await pilot.pause()
        rows = {row.layer: row for row in screen.table.comparison.rows}  # type: ignore[union-attr]
        assert "B-A" in text_of(app)
        await press(pilot, "d")
        await pilot.pause()
        assert "B/A" in text_of(app)
        await press(pilot, "d", "y")
        assert app.clipboard == f"atlas compare {pair[0]} {pair[1]}\n"
        await press(pilot, "x")
        await wait_until(lambda: screen.table.row_count > 0)
        await pilot.pause()
        assert "A two.h5   B one.h5" in text_of(app)
        swapped = screen.table.comparison.rows[2]  # type: ignore[union-attr]
        assert (swapped.supernodes_first, swapped.supernode_jaccard) == (rows[2].supernodes_second, rows[2].supernode_jaccard)
        await press(pilot, "x")
        await wait_until(lambda: "A one.h5" in text_of(app) and screen.table.row_count > 0)
        await press(pilot, "m")
        await wait_until(lambda: isinstance(app.screen, ChoiceScreen))
        await press(pilot, "j", "j", "enter")
        await wait_until(lambda: screen.table.comparison.first.metric == "activation_power")  # type: ignore[union-attr]
        await typed(pilot, "slash", "4")
        assert screen.table.cursor == 4
        await press(pilot, "p")
        await wait_until(lambda: isinstance(app.screen, ProtectScreen))
        await press(pilot, "c")
        await wait_until(lambda: isinstance(app.screen, CompareScreen))
        await press(pilot, "q")
        await wait_until(lambda: isinstance(app.screen, OverviewScreen))
        await press(pilot, "c")
        await compared(app)


@sizes
async def test_every_key_of_the_join_screen(pair: tuple[Path, Path], size: tuple[int, int]) -> None:
    first, second = (read_snapshot(path) for path in pair)
    app = app_of(pair)
    async with app.run_test(size=size) as pilot:
        await compared(app)
        await press(pilot, "2", "j")
        screen = await joined(pilot, app)
        table = screen.table
        assert table.order.tolist() == np.argsort(-first.values(2, "lp"), kind="stable").tolist()
        lost = (first.labels_of(2) == 2) & (second.labels_of(2) != 2)
        assert lost.any()
        await typed(pilot, "f", "only-A")
        assert sorted(table.order) == np.flatnonzero(lost).tolist()
        assert "only-A" in screen.query_one("#title", Lines).text
        await press(pilot, "escape")
        await pilot.pause()
        assert table.row_count == 400
        await typed(pilot, "f", "ratio<0.5 & rank_a<=200")
        ratio = second.values(2, "lp").astype(float) / first.values(2, "lp")
        rank = np.argsort(np.argsort(-first.values(2, "lp"), kind="stable"))
        assert sorted(table.order) == np.flatnonzero((ratio < 0.5) & (rank < 200)).tolist()
        await typed(pilot, "f", "both & only-A")
        assert "no channel here fits" in text_of(app)
        await press(pilot, "escape")
        assert "ratio<0.5" in screen.query_one("#title", Lines).text, "the filter before it stays"
        await typed(pilot, "f", "nothing>1")
        assert "unknown column 'nothing'" in text_of(app)
        await press(pilot, "escape", "escape")
        assert table.row_count == 400
        for column in table.columns:
            table.marked = column.key
            await press(pilot, "s", "S")
            assert sorted(table.order.tolist()) == list(range(400))
        await typed(pilot, "slash", "217")
        assert table.channel == 217
        await press(pilot, "y")
        names, values = app.clipboard.rstrip("\n").split("\n")
        row = dict(zip(names.split("\t"), values.split("\t"), strict=True))
        assert (row["channel"], np.float32(row["b"])) == ("217", second.values(2, "lp")[217])
        await press(pilot, "2", "right_square_bracket")
        await pilot.pause()
        assert "layer 4" in screen.query_one("#title", Lines).text
        await press(pilot, "9", "left_square_bracket", "enter", "q")
        await wait_until(lambda: isinstance(app.screen, CompareScreen))
        assert browser_screen(app).table.cursor == 0


async def test_experts_are_joined_as_one(tmp_path: Path) -> None:
    paths = [moe_atlas(tmp_path / f"{seed}.h5", calibration_seed=seed) for seed in (1, 2)]
    app = AtlasApp(Session(read_snapshot(paths[0]), other=read_snapshot(paths[1])))
    async with app.run_test(size=(160, 50)) as pilot:
        await compared(app)
        await press(pilot, "1", "j")
        screen = await joined(pilot, app)
        assert screen.table.row_count == 4 * 24
        assert ":" in screen.table.cells(0, screen.table.columns)[0][0]
        await typed(pilot, "slash", "2:7")
        assert screen.table.channel == 2 * 24 + 7
        assert screen.table.cells(screen.table.cursor, screen.table.columns)[0][0] == "2:7"
        await typed(pilot, "slash", "1:24")
        await pilot.pause()
        assert "not found: 1:24" in text_of(app)
        assert screen.table.channel == 2 * 24 + 7


async def test_a_filter_keeps_the_channel(pair: tuple[Path, Path]) -> None:
    app = app_of(pair)
    async with app.run_test(size=(80, 24)) as pilot:
        await compared(app)
        screen = await joined(pilot, app)
        await press(pilot, "5", "0", "j")
        channel = screen.table.channel
        await typed(pilot, "f", "rank_a>20")
        assert (screen.table.channel, screen.table.cursor) == (channel, 30)
        await press(pilot, "escape")
        await pilot.pause()
        assert (screen.table.channel, screen.table.cursor) == (channel, 50)


async def test_what_is_printed_is_swapped_and_filtered(pair: tuple[Path, Path]) -> None:
    app = app_of(pair)
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await compared(app)
        await press(pilot, "3", "j", "x")
        await wait_until(lambda: screen.table.row_count > 0)
        await pilot.pause()
        assert (screen.table.cursor, screen.ffn) == (3, 3)
        join = await joined(pilot, app)
        await typed(pilot, "f", "only-A")
        shown = join.table.order.tolist()
        await press(pilot, "D")
    assert app.return_value is not None
    command, *code = app.return_value.splitlines()
    assert command == f"# atlas-tui {pair[1]} {pair[0]} --screen join --layer 3 --filter only-A"
    assert f"rows = chanfmt.compare({str(pair[1])!r}, {str(pair[0])!r}, 'lp')" in code
    app = AtlasApp(Session(read_snapshot(pair[1]), other=read_snapshot(pair[0]), place=Place("join", 3, filter="only-A")))
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(lambda: isinstance(app.screen, JoinScreen))
        await pilot.pause()
        assert browser_screen(app).table.order.tolist() == shown  # type: ignore[attr-defined]


def test_a_filter_of_the_join_is_checked(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = random_atlas(tmp_path / "other.h5", calibration_seed=3)
    refusals = {"only-C": "'only-C' is not a label", "rank_c>1": "unknown column 'rank_c'", "ratio<0": "no channel of layer"}
    for text, reason in refusals.items():
        assert main([str(small), str(other), "--screenshot", "join", "--filter", text]) == 2
        assert reason in capsys.readouterr().err


async def test_a_metric_that_one_lacks_is_refused_both_ways(small: Path, tmp_path: Path) -> None:
    other = read_snapshot(atlases.without(tmp_path / "b.h5", "redundancy"))
    app = AtlasApp(Session(read_snapshot(small), other=other, place=Place("compare", metric="redundancy")))
    async with app.run_test(size=(400, 24)) as pilot:
        for _ in range(2):
            await app.workers.wait_for_complete()
            await pilot.pause()
            assert "b.h5 holds no 'redundancy'" in text_of(app)
            assert browser_screen(app).table.row_count == 0
            await press(pilot, "x")


@sizes
async def test_shares_are_of_as_many_channels_and_notes_are_shown(small: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    other = atlases.with_rho(tmp_path / "b.h5", 0.25)
    app = AtlasApp(Session(read_snapshot(small), other=read_snapshot(other)))
    async with app.run_test(size=size) as pilot:
        screen = await compared(app)
        await pilot.pause()
        assert "A top1%" in text_of(app)
        assert all(first == second for first, second in map(screen.table.comparison.top_shares, range(4)))  # type: ignore[union-attr]
        said = " ".join(text_of(app).split())
        if size[0] == 80:
            assert "note: 16 of 16 sequences in both; labels by other settings: rho" in said
        else:
            assert "note: 16 of 16 calibration sequences are in both" in said
            assert "rho 0.01 and 0.25" in screen.query_one("#panel", Lines).text.replace("\n", "")
        await press(pilot, "x")
        await wait_until(lambda: "A top25%" in text_of(app) and screen.table.row_count > 0)
        assert all(first == second for first, second in map(screen.table.comparison.top_shares, range(4)))  # type: ignore[union-attr]


async def test_the_second_file_is_read_again_if_it_changes(small: Path, tmp_path: Path) -> None:
    other = random_atlas(tmp_path / "other.h5", layers=4, channels=96, calibration_seed=3)
    app = app_of((small, other))
    async with app.run_test(size=(160, 24)) as pilot:
        compare = await compared(app)
        await press(pilot, "2", "j")
        screen = await joined(pilot, app)
        os.replace(random_atlas(tmp_path / "new.h5", layers=4, channels=96, calibration_seed=4), other)
        new = read_snapshot(other)
        app.session.poll()
        app.session.poll()
        await wait_until(lambda: np.array_equal(screen._joined.second.values, new.values(2, "lp")))
        assert compare.table.comparison is screen._comparison
        assert "layer 2" in screen.query_one("#title", Lines).text
        other.write_bytes(b"not an atlas")
        app.session.poll()
        app.session.poll()
        await wait_until(lambda: "still shown as read at" in screen.query_one("#status", Lines).text)
        os.replace(random_atlas(tmp_path / "wide.h5", layers=4, channels=128), other)
        await press(pilot, "r")
        await wait_until(lambda: "128" in screen.query_one("#status", Lines).text)
        assert np.array_equal(screen._joined.second.values, new.values(2, "lp"))
        await press(pilot, "q")
        await wait_until(lambda: app.screen is compare)
        assert compare.table.row_count == 0
        os.replace(random_atlas(tmp_path / "again.h5", layers=4, channels=96, calibration_seed=4), other)
        await press(pilot, "r")
        await wait_until(lambda: compare.table.row_count == 4)


async def test_c_asks_for_a_file_and_refuses_another_architecture(small: Path, tmp_path: Path) -> None:
    other = random_atlas(tmp_path / "other.h5", calibration_seed=3)
    wide = random_atlas(tmp_path / "wide.h5", channels=128)
    app = open_app(small)
    async with app.run_test(size=(160, 24)) as pilot:
        await press(pilot, "c", "escape")
        await pilot.pause()
        await typed(pilot, "c", "")
        await typed(pilot, "c", str(tmp_path / "none.h5"))
        await wait_until(lambda: "does not exist" in text_of(app))
        await typed(pilot, "c", str(wide))
        await wait_until(lambda: "has 96 channels" in text_of(app))
        assert app.session.other is None
        await typed(pilot, "c", str(other))
        await compared(app)


def test_another_architecture_is_refused_in_a_line(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(small), str(random_atlas(tmp_path / "wide.h5", channels=128))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("atlas-tui: error: ")
    assert "has 96 channels" in error
