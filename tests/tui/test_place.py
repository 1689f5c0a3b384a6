"""Views as data: opened from options, exported, rebuilt by the printed Python, drawn without a terminal."""

from __future__ import annotations

import csv
import json
import pkgutil
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pytest

from chanfmt.analysis.mass import concentration
from chanfmt.base.errors import UsageError
from tests.support.browsing import browser_screen, open_app, press, text_of, typed, wait_until
from tests.support.factory import moe_atlas, random_atlas, random_content
from tui.app import AtlasApp
from tui.picture import parse_size
from tui.screens.compare import CompareScreen
from tui.screens.layer import LayerScreen
from tui.screens.what_if import WhatIfScreen
from tui.session.export import write_table
from tui.session.load import read_snapshot
from tui.session.place import Place
from tui.session.registry import OF_TWO, REGISTRY, SCREENS
from tui.session.session import Session

if TYPE_CHECKING:
    from pathlib import Path

KINDS = {row.name: pkgutil.resolve_name(row.factory) for row in REGISTRY}


def rebuilt(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(text, "printed", "exec"), names)  # The program prints this code for the user to run.
    return names


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tui", *map(str, arguments)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("screen", SCREENS)
async def test_every_screen_opens_from_options_and_prints_them(screen: str, small: Path, tmp_path: Path) -> None:
    other = read_snapshot(random_atlas(tmp_path / "b.h5", seed=1)) if screen in OF_TWO else None
    path = moe_atlas(tmp_path / "moe.h5") if screen == "experts" else small
    place = Place(screen, 2, expert=1 if screen == "experts" else None, metric="taylor", by_index=True)
    app = AtlasApp(Session(read_snapshot(path), place=place, other=other))
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(lambda: isinstance(app.screen, KINDS[screen]))
        await app.workers.wait_for_complete()
        await pilot.pause()
        layer = app.session.browser.snapshot.ffns[app.screen_stack[1].ffn if screen == "card" else browser_screen_below(app).ffn]
        assert layer.layer_index == 2
        assert (app.session.browser.metric, app.session.browser.log_axis) == ("taylor", False)
        await press(pilot, "D")
    assert app.return_value is not None
    command, *_ = app.return_value.splitlines()
    assert command.startswith(f"# atlas-tui {path}")
    assert "--layer 2" in command
    assert (f"--screen {screen}" in command) == (screen != "overview")
    rebuilt(app.return_value)


def browser_screen_below(app: AtlasApp) -> Any:
    return next(screen for screen in reversed(app.screen_stack) if hasattr(screen, "ffn") or hasattr(screen, "table"))


async def test_the_printed_python_gives_the_rows_shown(small: Path) -> None:
    app = AtlasApp(
        Session(read_snapshot(small), place=Place("layer", 1, sort="activation_power:up", filter="rank<=40 & !super | marked"))
    )
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        await pilot.pause()
        await press(pilot, "5", "j", "space", "u", "space")
        await pilot.pause()
        screen = browser_screen(app)
        assert isinstance(screen, LayerScreen)
        shown = screen.table.order.tolist()
        assert 30 < len(shown) < 96
        await press(pilot, "D")
        await wait_until(lambda: "some marks are not saved" in text_of(app))
        await press(pilot, "G", "enter")
    assert app.return_value is not None
    assert rebuilt(app.return_value)["order"].tolist() == shown


async def test_the_printed_python_of_the_overview(small: Path) -> None:
    app = open_app(small)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(pilot, "m")
        await press(pilot, "j", "j", "enter")
        await pilot.pause()
        assert app.session.browser.metric == "activation_power"
        await press(pilot, "D")
    assert app.return_value is not None
    rows = rebuilt(app.return_value)["rows"]
    expected = [concentration(row) for row in random_content().stacks[0].variables["activation_power"]]
    assert [row.mass for row in rows.values()] == pytest.approx([row.mass for row in expected])


async def test_what_if_prints_the_command_that_cuts(small: Path) -> None:
    app = AtlasApp(Session(read_snapshot(small), place=Place("what-if")))
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(lambda: isinstance(app.screen, WhatIfScreen))
        await press(pilot, "3", "5", "l", "D")
    assert app.return_value is not None
    assert app.return_value.splitlines()[1] == f"# surgery prune {small} --method scar-prot --sparsity 0.35"


async def test_a_layer_is_exported_as_shown(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = AtlasApp(Session(read_snapshot(small), place=Place("layer", 1, filter="rank<=7", sort="channel:up")))
    variables = random_content().stacks[0].variables
    refusals = {"x.xlsx": "cannot tell the format", "no/x.csv": "does not exist", "a-layer-L1.csv": "exists"}
    async with app.run_test(size=(160, 50)) as pilot:
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        await pilot.pause()
        await press(pilot, "e")
        await pilot.pause()
        await press(pilot, "enter")
        await wait_until(lambda: "wrote 7 rows to a-layer-L1.csv" in text_of(app))
        for name in ("x.json", "x.npy", "x.xlsx", "no/x.csv", "a-layer-L1.csv"):
            await typed(pilot, "e", name)
            wanted = refusals.get(name, f"wrote 7 rows to {name}")
            await wait_until(partial(lambda text: text in text_of(app), wanted))
    with (tmp_path / "a-layer-L1.csv").open() as file:
        rows = list(csv.DictReader(file))
    channels = [int(row["channel"]) for row in rows]
    assert channels == sorted(np.argsort(-variables["lp"][1])[:7].tolist())
    array, objects = np.load(tmp_path / "x.npy"), json.loads((tmp_path / "x.json").read_text())
    for name in ("lp", "taylor", "redundancy"):
        expected_values = variables[name][1][channels].astype(np.float32)
        np.testing.assert_array_equal(array[name], expected_values)
        for read in ([row[name] for row in rows], [row[name] for row in objects]):
            np.testing.assert_array_equal(np.array([value or np.nan for value in read], np.float32), expected_values)
    assert rows[0]["label"] in ("none", "halo", "supernode")
    assert not any(row["marked"] for row in objects)


@pytest.mark.parametrize("screen", sorted({*SCREENS} - {"card", "scatter"}))
async def test_every_table_is_exported_whole(screen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, other = moe_atlas(tmp_path / "moe.h5"), read_snapshot(moe_atlas(tmp_path / "b.h5"))
    app = AtlasApp(Session(read_snapshot(path), place=Place(screen, 1 if screen == "experts" else None), other=other))
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(lambda: isinstance(app.screen, KINDS[screen]))
        await app.workers.wait_for_complete()
        await pilot.pause()
        table = browser_screen(app).table
        rows = table.row_count
        await typed(pilot, "e", "out.csv")
        await wait_until(lambda: f"wrote {rows:,} rows" in text_of(app))
    with (tmp_path / "out.csv").open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == rows > 0
    assert {column.key for column in table.columns} - {"layer"} <= set(read[0])


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv", {"stack": np.array(["=1+1", "decoder"]), "lp": np.array([-1.5, np.nan], np.float32)})
    assert (tmp_path / "a.csv").read_text() == "stack,lp\n'=1+1,-1.5\ndecoder,\n"


def test_pictures_without_a_terminal(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "p.svg"
    done = run(small, "--screenshot", "layer", "--layer", "2", "--filter", "super", "--export-svg", target, "--size", "90x20")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{target}\n", "")
    text = "".join(ElementTree.parse(target).getroot().itertext()).replace("\xa0", " ")
    assert "layer 2   1 of 96 ch: super" in text
    assert "? help" in text.replace("  ", " ")
    before = target.read_bytes()
    refused = run(small, "--export-svg", target)
    assert refused.returncode == 2
    assert "exists" in refused.stderr
    assert target.read_bytes() == before
    assert run(small, "--export-svg", target, "--overwrite", "--theme", "textual-light").returncode == 0
    assert target.read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "p.svg"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--layer", "9"], "unknown layer 9"),
        (["--metric", "fame"], "unknown metric 'fame'"),
        (["--layer", "1", "--channel", "96"], "channels: 0 to 95"),
        (["--expert", "0"], "unknown expert 0"),
        (["--screenshot", "compare"], "needs a second atlas"),
        (["--screenshot", "layer", "--size", "10x3"], "not COLUMNSxROWS"),
        (["--screenshot", "layer", "--theme", "mauve"], "unknown theme 'mauve'"),
        (["--screenshot", "attic"], "unknown screen 'attic'"),
        (["--sort", "fame:up"], "unknown column 'fame' after --sort"),
        (["--screenshot", "layer", "--filter", "lpp>1"], "unknown column 'lpp'"),
        (["--screenshot", "layer", "--filter", "lp>1e30"], "no channel of layer 0 fits"),
        (["x" * 300 + ".h5"], "File name too long"),
        ([], "needs a terminal"),
    ],
)
def test_refusals(arguments: list[str], reason: str, small: Path) -> None:
    done = run(small, *arguments)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["a.h5", "b.h5", "p.json", "../link/a.h5"])
def test_a_picture_replaces_nothing_that_is_drawn(name: str, small: Path, tmp_path: Path) -> None:
    other = random_atlas(tmp_path / "b.h5", seed=1)
    (tmp_path / "p.json").write_text('{"format": "protect/1", "layers": {}}')
    link = tmp_path.parent / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path)
    target = tmp_path / name
    before = target.read_bytes()
    done = run(small, other, "--protect", tmp_path / "p.json", "--export-svg", target, "--overwrite")
    assert done.returncode == 2
    assert "the picture would replace" in done.stderr
    assert target.read_bytes() == before


async def test_names_of_files_that_cannot_be(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    random_atlas(tmp_path / "b.h5", seed=1)
    app = open_app(small)
    async with app.run_test(size=(400, 50)) as pilot:
        await typed(pilot, "e", "~nosuchuser/x.csv")
        await wait_until(lambda: "nosuchuser does not exist" in text_of(app))
        for key, name in (("e", "x" * 300 + ".csv"), ("c", "x" * 300)):
            await typed(pilot, key, name)
            await wait_until(lambda: "File name too long" in text_of(app))
            await press(pilot, "j")
            await pilot.pause()
        await typed(pilot, "c", "~nosuchuser/x.h5")
        await wait_until(lambda: "~nosuchuser/x.h5 does not exist" in text_of(app))
        await typed(pilot, "c", "~/b.h5")
        await wait_until(lambda: isinstance(app.screen, CompareScreen))


def test_sizes() -> None:
    assert parse_size("80x24") == (80, 24)
    for text in ("80", "80x24x1", "x", "-80x24", "19x24", "80x4"):
        with pytest.raises(UsageError):
            parse_size(text)


@pytest.mark.parametrize("screen", SCREENS)
async def test_every_screen_holds_at_every_size(screen: str, tmp_path: Path) -> None:
    path, other = moe_atlas(tmp_path / "moe.h5"), read_snapshot(moe_atlas(tmp_path / "b.h5"))
    app = AtlasApp(Session(read_snapshot(path), place=Place(screen, 1), other=other))
    async with app.run_test(size=(20, 5)) as pilot:
        await wait_until(lambda: isinstance(app.screen, KINDS[screen]))
        await app.workers.wait_for_complete()
        for width, height in [(20, 5), (300, 80), (109, 13), (110, 14), (80, 24)]:
            await pilot.resize_terminal(width, height)
            await pilot.pause()
            await press(pilot, "j", "l", "k", "y")
            await pilot.pause()
            assert [len(row) for row in text_of(app).splitlines()] == [width] * height
