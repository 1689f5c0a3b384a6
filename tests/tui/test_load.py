"""Reading an atlas whole, and atlases that are not the usual one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import pytest

from chanfmt.errors import AtlasError
from chanfmt.schema import METRICS
from tests.factory import moe_atlas, random_content
from tests.tui import atlases
from tests.tui.conftest import browser_screen, open_app, press, text_of, wait_until
from tui import view
from tui.load import read_snapshot
from tui.model import Browser
from tui.screens.layer import LayerScreen

if TYPE_CHECKING:
    from pathlib import Path

SIZES = [(80, 24), (160, 50)]


def test_snapshot_holds_what_was_written_and_the_file_is_closed(small: Path) -> None:
    content = random_content()
    snapshot = read_snapshot(small)
    assert snapshot.metrics == tuple(metric.name for metric in METRICS)
    assert [ffn.layer_index for ffn in snapshot.ffns] == [0, 1, 2, 3]
    np.testing.assert_allclose(snapshot.values(2, "lp"), content.stacks[0].variables["lp"][2], rtol=1e-6)
    np.testing.assert_array_equal(snapshot.labels_of(3), content.stacks[0].variables["label"][3])
    assert not [link for link in os.listdir("/proc/self/fd") if _target(link).endswith("a.h5")]


def _target(link: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{link}")
    except OSError:
        return ""


def test_a_stack_without_a_metric_gives_nan(tmp_path: Path) -> None:
    snapshot = read_snapshot(atlases.without(tmp_path / "a.h5", "redundancy", "redundancy_null"))
    assert "redundancy" not in snapshot.metrics
    assert np.isnan(snapshot.values(0, "redundancy")).all()
    assert Browser(snapshot, "redundancy").metric == "lp"


def test_names_from_the_file_lose_their_control_characters(tmp_path: Path) -> None:
    snapshot = read_snapshot(atlases.with_names(tmp_path / "a.h5", "evil\x1b[31m\x07"))
    assert "\x1b" not in snapshot.model_id + snapshot.ffns[0].module


def test_experts_are_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="holds experts"):
        read_snapshot(moe_atlas(tmp_path / "a.h5"))


def test_an_atlas_without_any_lp_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="every value is NaN"):
        read_snapshot(atlases.with_lp(tmp_path / "a.h5", np.full((4, 96), np.nan)))
    with pytest.raises(AtlasError, match="'lp'"):
        read_snapshot(atlases.without(tmp_path / "b.h5", "lp"))


def test_find_ffns(tmp_path: Path) -> None:
    snapshot = read_snapshot(atlases.two_stacks(tmp_path / "a.h5"))
    answers = [("3", [3]), ("L3", [3]), ("layer 3", [3]), ("-64", [3, 4]), ("layers.1", [1, 4]), ("x", [])]
    for query, expected in answers:
        assert np.flatnonzero(view.match_ffns(snapshot, query)).tolist() == expected, query


@pytest.mark.parametrize("size", SIZES)
async def test_two_stacks_of_different_widths(tmp_path: Path, size: tuple[int, int]) -> None:
    app = open_app(atlases.two_stacks(tmp_path / "a.h5"))
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        shown = text_of(app)
        assert "5 FFNs × 64–96 ch" in shown
        assert "stack" in shown.splitlines()[1]
        assert "decoder-64" in shown
        await pilot.press("i", "full_stop", "full_stop", "comma", "s", "G", "enter")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        await pilot.press("9", "right_square_bracket")
        await pilot.pause()
        screen = app.screen
        assert isinstance(screen, LayerScreen)
        assert screen.table.row_count == 64
        assert "layer 4 decoder-64" in text_of(app)
        await pilot.press("G", "9", "left_square_bracket", "G")
        await pilot.pause()
        assert screen.table.row_count == 96
        assert screen.table.cursor == 95


@pytest.mark.parametrize("size", SIZES)
async def test_nan_in_lp_is_shown_as_a_dash(tmp_path: Path, size: tuple[int, int]) -> None:
    lp = np.array(random_content().stacks[0].variables["lp"])
    lp[1] = np.nan
    lp[2, :10] = np.nan
    app = open_app(atlases.with_lp(tmp_path / "a.h5", lp))
    async with app.run_test(size=size) as pilot:
        await press(pilot, "j")
        await pilot.pause()
        assert text_of(app).splitlines()[3].split()[:5] == ["▶", "1", "-", "-", "-"]
        await press(pilot, "s", "g", "G")
        await pilot.pause()
        assert text_of(app).splitlines()[5].split()[:2] == ["▶", "1"]
        for _ in range(3):
            await press(pilot, "enter", "G")
            await wait_until(lambda: isinstance(app.screen, LayerScreen))
            await pilot.pause()
            await press(pilot, "S", "i", "q")
            await pilot.pause()
            await press(pilot, "k")
        assert browser_screen(app).table.row_count == 4


async def test_a_layer_of_zeros_and_one_channel_with_everything(tmp_path: Path) -> None:
    lp = np.zeros((4, 96), dtype=np.float32)
    lp[1, 7] = 3.0
    app = open_app(atlases.with_lp(tmp_path / "a.h5", lp))
    async with app.run_test(size=(160, 50)) as pilot:
        for _ in range(2):
            await press(pilot, "enter", "G")
            await wait_until(lambda: isinstance(app.screen, LayerScreen))
            await pilot.pause()
            await press(pilot, "q", "j")
        assert "100.0%" in text_of(app)
