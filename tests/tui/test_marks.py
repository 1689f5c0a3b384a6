"""Marks, filters and the protect file: keys, undo, conflicts, and what surgery does with the file."""

from __future__ import annotations

import json
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual.widgets import Input

from chanfmt.base.errors import UsageError
from chanfmt.format.reader import Atlas
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from surgery.planning.protect_file import read_protect_file
from tests.support import browsed as atlases
from tests.support.browsing import browser_screen, in_layer, open_app, press, text_of, typed, wait_until
from tests.support.factory import random_atlas
from tui.app import AtlasApp
from tui.cli import main
from tui.screens.card import CardScreen
from tui.screens.choice import ChoiceScreen
from tui.screens.layer import LayerScreen
from tui.screens.overview import OverviewScreen
from tui.screens.protect import ProtectScreen
from tui.session.filter import counted, filtered
from tui.session.load import read_snapshot
from tui.session.marks import Marks
from tui.session.protect import read_marks, write_marks
from tui.session.session import Session

if TYPE_CHECKING:
    from pathlib import Path


SIZES = [(80, 24), (160, 50)]
sizes = pytest.mark.parametrize("size", SIZES)


@given(st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 9)), st.booleans()), max_size=12), st.integers(0, 12))
def test_undo_and_redo_are_inverse(changes: list[tuple[int, set[int], bool]], back: int) -> None:
    marks = Marks([10, 10, 10], {1: np.arange(10) < 3})
    states = [marks.masks]
    for ffn, channels, on in changes:
        if marks.mark({ffn: np.array(sorted(channels), dtype=int)}, "x", on=on):
            states.append(marks.masks)
    steps = min(back, len(states) - 1)
    for _ in range(steps):
        assert marks.undo()
    expected = states[len(states) - 1 - steps]
    assert all(np.array_equal(marks.masks[ffn], expected[ffn]) for ffn in range(3))
    for _ in range(steps):
        assert marks.redo()
    assert all(np.array_equal(marks.masks[ffn], states[-1][ffn]) for ffn in range(3))
    assert marks.redo() is None
    added, removed = marks.unsaved
    assert sum(marks.counts) == 3 + added - removed


def test_filters() -> None:
    lp = np.array([1.0, 0.5, np.nan, 0.01])
    labels = np.array([2, 1, 0, 0], dtype=np.uint8)
    marked = np.array([False, True, False, True])

    def wanted(text: str) -> list[int]:
        return np.flatnonzero(filtered(text, {"lp": lp, "rank": np.arange(1, 5)}, labels, {"marked": marked})).tolist()

    assert wanted("lp>0.1") == [0, 1]
    assert wanted("lp > 1e-3 & super") == [0]
    assert wanted("rank<2 | marked") == [0, 1, 3]
    assert wanted("!marked & lp<=50%") == []
    assert wanted("label==halo") == [1]
    assert wanted("label!=halo & none") == [2, 3]
    assert wanted("lp!=1") == [1, 3]
    for text, reason in [
        ("lp>", "not a condition"),
        ("lp>x", "not a number"),
        ("zz>1", "unknown column"),
        ("quux", "not a label"),
        ("", "not a condition"),
    ]:
        with pytest.raises(UsageError, match=reason):
            wanted(text)
    columns = {"lp": lp}
    assert counted("lp>0.1", columns, labels, {}) == "2 of 4"
    assert counted("", columns, labels, {}) == "all"
    assert "unknown column" in counted("zz>1", columns, labels, {})


@sizes
async def test_the_count_follows_what_is_typed(small: Path, size: tuple[int, int]) -> None:
    app = open_app(small)
    async with app.run_test(size=size) as pilot:
        await in_layer(pilot, app)
        await press(pilot, "f")
        await pilot.pause()
        for text, shown in [("rank<9", "8 of 96"), ("5", "94 of 96"), ("&zz", "'zz' is not a label")]:
            await press(pilot, *text)
            await pilot.pause()
            assert shown in text_of(app)
        await press(pilot, *"eristoolongforthelinethatitisin>1")
        await pilot.pause()
        assert "linethatitisin>1" in text_of(app)
        await press(pilot, "escape")
        await pilot.pause()
        assert "96 ch" in text_of(app)


@sizes
async def test_marks_ranges_filters_undo(small: Path, size: tuple[int, int]) -> None:
    app = open_app(small)
    async with app.run_test(size=size) as pilot:
        screen = await in_layer(pilot, app)
        first = screen.table.channel
        await press(pilot, "space")
        assert np.flatnonzero(app.session.marks.of(0)).tolist() == [first]
        await pilot.pause()
        assert "●" in text_of(app)
        assert "1 unsaved" in text_of(app) or "marked 1" in text_of(app)
        await press(pilot, "j", "V", "3", "j")
        await pilot.pause()
        assert "range of 4" in text_of(app)
        await press(pilot, "space")
        assert sorted(screen.table.order[:5]) == np.flatnonzero(app.session.marks.of(0)).tolist()
        await press(pilot, "u", "u")
        assert not app.session.marks.of(0).any()
        await press(pilot, "R")
        assert app.session.marks.counts == [1, 0, 0, 0]
        await press(pilot, "g", "V", "escape", "space")
        assert app.session.marks.counts == [0, 0, 0, 0]
        await typed(pilot, "f", "rank<=7 & !super")
        labels = app.session.browser.snapshot.labels_of(0)
        kept = [channel for channel in app.session.browser.ranking(range(1)).order[:7] if labels[channel] != 2]
        assert screen.table.order.tolist() == kept
        assert f"{len(kept)} of 96 ch" in text_of(app)
        await press(pilot, "a")
        assert np.flatnonzero(app.session.marks.of(0)).tolist() == sorted(kept)
        await press(pilot, "right_square_bracket")
        assert screen.ffn == 1
        assert len(screen.table.order) < 8
        await press(pilot, "left_square_bracket", "A")
        assert app.session.marks.counts == [0, 0, 0, 0]
        await press(pilot, "escape")
        assert screen.table.row_count == 96
        await typed(pilot, "f", "lp>1e30")
        assert "no channel here fits" in text_of(app)
        # The line stays, so that the user can correct it.
        assert screen.query_one("#find", Input).value == "lp>1e30"
        await press(pilot, "escape")
        await typed(pilot, "f", "nonsense>1")
        assert "unknown column" in text_of(app)
        await press(pilot, *["backspace"] * 40)
        await press(pilot, *"rank<=2")
        await press(pilot, "enter")
        await pilot.pause()
        assert screen.table.row_count == 2
        await press(pilot, "escape")
        assert screen.table.row_count == 96


async def test_a_range_ends_if_the_rows_change(small: Path) -> None:
    app = open_app(small)
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await in_layer(pilot, app)
        for keys in (["S"], ["right_square_bracket"], ["full_stop", "s"]):
            await press(pilot, "V", "2", "j", *keys)
            await pilot.pause()
            assert "range" not in text_of(app)
            await press(pilot, "space")
            assert np.flatnonzero(app.session.marks.of(screen.ffn)).tolist() == [screen.table.channel]
            await press(pilot, "u")
        await press(pilot, "V", "2", "j")
        await typed(pilot, "f", "rank<50")
        await press(pilot, "space")
        assert sum(app.session.marks.counts) == 1
        await press(pilot, "u", "V", "2", "j", "enter")
        await wait_until(lambda: isinstance(app.screen, CardScreen))
        await press(pilot, "space")
        await pilot.pause()
        assert np.flatnonzero(app.session.marks.of(screen.ffn)).tolist() == [screen.table.channel]


@sizes
async def test_the_protect_screen(small: Path, size: tuple[int, int]) -> None:
    app = open_app(small)
    async with app.run_test(size=size) as pilot:
        await press(pilot, "2", "j", "p")
        await wait_until(lambda: isinstance(app.screen, ProtectScreen))
        await pilot.pause()
        screen = browser_screen(app)
        assert screen.ffn == 2
        await typed(pilot, "plus", "supernodes")
        await wait_until(lambda: any(app.session.marks.counts))
        core = [int((app.session.browser.snapshot.labels_of(ffn) == 2).sum()) for ffn in range(4)]
        assert app.session.marks.counts == core
        await pilot.pause()
        assert f"{sum(core):,} channels in 4 of 4 FFNs" in text_of(app)
        await press(pilot, "x")
        assert app.session.marks.counts[2] == 0
        await typed(pilot, "minus", "0:0-95")
        await wait_until(lambda: app.session.marks.counts[0] == 0)
        await typed(pilot, "plus", "top:nonsense=3")
        await wait_until(lambda: "nonsense" in text_of(app))
        await press(pilot, "U")
        assert app.session.marks.counts == [0, 0, 0, 0]
        await press(pilot, "u")
        assert any(app.session.marks.counts)
        await press(pilot, "y")
        assert app.clipboard == f"surgery prune {small} --protect {small.parent / 'a.protect.json'} --sparsity 0.5\n"
        await press(pilot, "enter")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        await press(pilot, "p")
        await wait_until(lambda: isinstance(app.screen, ProtectScreen))
        await press(pilot, "q")
        await wait_until(lambda: isinstance(app.screen, OverviewScreen))
        assert browser_screen(app).ffn == 2


async def test_what_is_written_is_what_surgery_protects(small: Path) -> None:
    app = open_app(small)
    path = small.parent / "a.protect.json"
    async with app.run_test(size=(80, 24)) as pilot:
        await press(pilot, "j")
        await in_layer(pilot, app)
        await press(pilot, "G", "V", "4", "k", "space", "W")
        await wait_until(path.exists)
        await wait_until(lambda: not any(app.session.marks.unsaved))
        marked = np.flatnonzero(app.session.marks.of(1))
    assert len(marked) == 5
    assert json.loads(path.read_text())["layers"] == {"1": marked.tolist()}
    with Atlas.open(small) as atlas:
        masks, warnings = read_protect_file(path, atlas)
        plan = make_plan(atlas, PlanOptions(0.5, "scar-lp", protect=(str(path),)))
    assert not warnings
    assert np.flatnonzero(masks[1]).tolist() == marked.tolist()
    assert set(marked) <= set(plan.blocks[1].kept.tolist())
    marks, _, signature = read_marks(path, read_snapshot(small))
    again = AtlasApp(Session(read_snapshot(small), marks=marks, protect_signature=signature))
    assert again.session.marks.counts == [0, 5, 0, 0]
    assert not any(again.session.marks.unsaved)


@pytest.mark.parametrize("choice", ["stay", "load", "write"])
async def test_a_file_that_changed_is_not_written_over(small: Path, choice: str) -> None:
    app = open_app(small)
    path = small.parent / "a.protect.json"
    other = '{"format": "protect/1", "layers": {"3": [1, 2]}}'
    async with app.run_test(size=(80, 24)) as pilot:
        await in_layer(pilot, app)
        await press(pilot, "space")
        path.write_text(other)
        await press(pilot, "W")
        await wait_until(lambda: isinstance(app.screen, ChoiceScreen))
        await press(pilot, *{"stay": ["escape"], "load": ["j", "enter"], "write": ["j", "j", "enter"]}[choice])
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        if choice == "load":
            await wait_until(lambda: app.session.marks.counts == [0, 0, 0, 2])
            assert not any(app.session.marks.unsaved)
        elif choice == "write":
            await wait_until(lambda: not any(app.session.marks.unsaved))
            assert list(json.loads(path.read_text())["layers"]) == ["0"]
        if choice != "write":
            assert path.read_text() == other


async def test_what_was_forgotten_is_not_shown(small: Path) -> None:
    app = open_app(small)
    path = small.parent / "a.protect.json"
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await in_layer(pilot, app)
        await press(pilot, "space")
        path.write_text('{"format": "protect/1", "layers": {"3": [1, 2]}}')
        await press(pilot, "W")
        await wait_until(lambda: isinstance(app.screen, ChoiceScreen))
        await press(pilot, "j", "enter")
        await wait_until(lambda: app.session.marks.counts == [0, 0, 0, 2])
        await pilot.pause()
        assert "●" not in text_of(app)
        assert screen.table.marked_channels is app.session.marks.of(0)


async def test_the_title_of_a_conflict_is_not_markup(small: Path) -> None:
    path = small.parent / "[red]x[b] [.protect.json"
    app = AtlasApp(Session(read_snapshot(small), protect_file=path))
    async with app.run_test(size=(120, 24)) as pilot:
        await in_layer(pilot, app)
        await press(pilot, "space")
        path.write_text("{}")
        await press(pilot, "W")
        await wait_until(lambda: isinstance(app.screen, ChoiceScreen))
        await pilot.pause()
        assert f"{path.name} has changed on disk" in text_of(app)


async def test_marks_made_while_it_is_written_are_not_written(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(10)
        return write_marks(*arguments)

    monkeypatch.setattr("tui.session.marking.write_marks", slow)
    app = open_app(small)
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await in_layer(pilot, app)
        await press(pilot, "space", "W")
        await wait_until(begun.is_set)
        first = screen.table.channel
        await press(pilot, "j", "space", "W")
        await pilot.pause()
        assert "still writing" in text_of(app)
        go_on.set()
        await wait_until(lambda: "wrote" in text_of(app))
        assert app.session.marks.unsaved == (1, 0)
        assert json.loads(app.session.protect_file.read_text())["layers"] == {"0": [first]}
        await press(pilot, "W")
        await wait_until(lambda: not any(app.session.marks.unsaved))


async def test_an_atlas_that_has_grown_is_read_before_marks_are_written(tmp_path: Path) -> None:
    path = atlases.last_layers(tmp_path / "a.h5", 2)
    app = open_app(path)
    async with app.run_test(size=(160, 24)) as pilot:
        await press(pilot, "p")
        await wait_until(lambda: isinstance(app.screen, ProtectScreen))
        app.session.mark({1: np.arange(3)}, "three", on=True)
        random_atlas(tmp_path / "next.h5").replace(path)
        for keys, text in ((["W"], ""), (["plus"], "supernodes"), (["w"], "")):
            await (typed(pilot, keys[0], text) if text else press(pilot, *keys))
            await wait_until(lambda: "have changed: read it again" in text_of(app))
            await press(pilot, "j")
            await pilot.pause()
        await press(pilot, "r")
        await wait_until(lambda: len(app.session.browser.snapshot.ffns) == 4)
        await press(pilot, "W")
        await wait_until(app.session.protect_file.exists)
        await wait_until(lambda: not any(app.session.marks.unsaved))
    assert json.loads(app.session.protect_file.read_text())["layers"] == {"3": [0, 1, 2]}


@pytest.mark.parametrize("choice", ["stay", "load"])
async def test_loading_asks_if_marks_are_not_saved(small: Path, choice: str) -> None:
    app = open_app(small)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(pilot, "p")
        await wait_until(lambda: isinstance(app.screen, ProtectScreen))
        app.session.mark({0: np.arange(3)}, "three", on=True)
        await press(pilot, "o")
        await wait_until(lambda: "a.protect.json does not exist" in text_of(app))
        assert app.session.marks.counts[0] == 3
        await press(pilot, "W")
        await wait_until(lambda: not any(app.session.marks.unsaved))
        await press(pilot, "x", "o")
        await wait_until(lambda: isinstance(app.screen, ChoiceScreen))
        await press(pilot, *{"stay": ["enter"], "load": ["j", "enter"]}[choice])
        await wait_until(lambda: isinstance(app.screen, ProtectScreen))
        if choice == "load":
            await wait_until(lambda: app.session.marks.counts[0] == 3)
        else:
            assert app.session.marks.counts[0] == 0


@pytest.mark.parametrize("choice", ["stay", "write"])
async def test_quitting_asks_before_it_writes_over_what_changed(small: Path, choice: str) -> None:
    app = open_app(small)
    other = '{"format": "protect/1", "layers": {"3": [1, 2]}}'
    async with app.run_test(size=(80, 24)) as pilot:
        app.session.mark({0: np.arange(3)}, "three", on=True)
        app.session.protect_file.write_text(other)
        await press(pilot, "q")
        await wait_until(lambda: "some marks are not saved" in text_of(app))
        await press(pilot, "j", "enter")
        await wait_until(lambda: "has changed on disk" in text_of(app))
        assert app.session.protect_file.read_text() == other
        await press(pilot, *{"stay": ["enter"], "write": ["G", "enter"]}[choice])
        await wait_until(lambda: isinstance(app.screen, OverviewScreen) if choice == "stay" else not app.is_running)
    assert (app.session.protect_file.read_text() == other) == (choice == "stay")


async def test_ctrl_c_asks_about_unsaved_marks_and_ends_the_program_when_pressed_again(small: Path) -> None:
    app = open_app(small)
    async with app.run_test(size=(80, 24)) as pilot:
        await in_layer(pilot, app)
        await press(pilot, "space")
        await press(pilot, "ctrl+c")
        await wait_until(lambda: "some marks are not saved" in text_of(app))
        await press(pilot, "ctrl+c")
        await wait_until(lambda: not app.is_running)
    assert app.return_code == 0


async def test_a_refused_rule_can_be_corrected(small: Path) -> None:
    app = open_app(small)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(pilot, "p")
        await pilot.pause()
        await typed(pilot, "plus", "supernoods")
        await wait_until(lambda: "unknown selector" in text_of(app))
        await press(pilot, "plus")
        await pilot.pause()
        assert app.screen.query_one("#find", Input).value == "supernoods"


@pytest.mark.parametrize("choice", ["stay", "write", "quit"])
async def test_unsaved_marks_are_asked_about_once(small: Path, choice: str) -> None:
    app = open_app(small)
    path = small.parent / "a.protect.json"
    async with app.run_test(size=(80, 24)) as pilot:
        await in_layer(pilot, app)
        await press(pilot, "space", "q")
        await wait_until(lambda: isinstance(app.screen, OverviewScreen))
        await press(pilot, "q")
        await wait_until(lambda: isinstance(app.screen, ChoiceScreen))
        await press(pilot, *{"stay": ["enter"], "write": ["j", "enter"], "quit": ["j", "j", "enter"]}[choice])
        await pilot.pause()
        if choice == "stay":
            assert isinstance(app.screen, OverviewScreen)
            assert app.is_running
        else:
            await wait_until(lambda: not app.is_running)
    assert path.exists() == (choice == "write")


async def test_a_place_that_cannot_be_written(small: Path) -> None:
    app = AtlasApp(Session(read_snapshot(small), protect_file=small.parent / "none" / "p.json"))
    async with app.run_test(size=(120, 24)) as pilot:
        await in_layer(pilot, app)
        await press(pilot, "space", "W")
        await wait_until(lambda: "none" in text_of(app))
        assert app.session.marks.unsaved == (1, 0)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("p.csv", "", "does not end in .json"),
        ("p.json", "{", "not valid JSON"),
        ("p.json", '{"format": "protect/1", "layers": {"9": [1]}}', "no layer 9"),
    ],
)
def test_bad_protect_files(
    small: Path, name: str, text: str, reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small.parent / name
    path.write_text(text)
    assert main([str(small), "--protect", str(path)]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert "Traceback" not in error


def test_the_browser_imports_no_torch(small: Path) -> None:
    import subprocess

    code = "import sys, tui.app; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
