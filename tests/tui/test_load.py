"""Reading a whole atlas, and unusual atlases."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

import chanfmt
from chanfmt.base.errors import AtlasError
from chanfmt.format.schema import METRICS
from tests.support import browsed as atlases
from tests.support.browsing import browser_screen, open_app, press, text_of, wait_until
from tests.support.factory import moe_atlas, moe_content, random_atlas, random_content
from tui.screens.layer import LayerScreen
from tui.session import stored, view
from tui.session.load import read_snapshot
from tui.session.model import Browser

SIZES = [(80, 24), (160, 50)]
VALID = Path(__file__).parents[2] / "spec" / "conformance" / "valid"


def test_snapshot_holds_what_was_written_and_the_file_is_closed(small: Path) -> None:
    content = random_content()
    snapshot = read_snapshot(small)
    assert tuple(snapshot.metrics) == tuple(metric.name for metric in METRICS)
    assert [ffn.layer_index for ffn in snapshot.ffns] == [0, 1, 2, 3]
    np.testing.assert_allclose(snapshot.values(2, "lp"), content.stacks[0].variables["lp"][2], rtol=1e-6)
    np.testing.assert_array_equal(snapshot.labels_of(3), content.stacks[0].variables["label"][3])
    np.testing.assert_allclose(snapshot.values(2, "taylor"), content.stacks[0].variables["taylor"][2], rtol=1e-6)


def test_others_may_write_to_the_file_and_replace_it(small: Path) -> None:
    snapshot = read_snapshot(small)
    before = random_content().stacks[0].variables["taylor"]
    with h5py.File(small, "r+") as file:
        file["stacks/decoder/taylor"][1] = 7.0
    assert (snapshot.values(1, "taylor") == 7.0).all()
    os.replace(random_atlas(small.with_name("next.h5"), seed=1), small)
    np.testing.assert_allclose(snapshot.values(3, "taylor"), before[3], rtol=1e-6)
    np.testing.assert_allclose(
        read_snapshot(small).values(1, "taylor"), random_content(seed=1).stacks[0].variables["taylor"][1], rtol=1e-6
    )


def test_what_is_cut_off_the_file_is_unknown(small: Path) -> None:
    snapshot = read_snapshot(small)
    os.truncate(small, 100)
    assert np.isnan(snapshot.values(1, "taylor")).all()
    assert np.isfinite(snapshot.values(1, "lp")).all()


def test_descriptors_are_closed_with_the_snapshot(small: Path) -> None:
    def held() -> int:
        return sum(_target(link).endswith("a.h5") for link in os.listdir("/proc/self/fd"))

    before = held()
    snapshot = read_snapshot(small)
    assert held() == before + 1
    del snapshot
    assert held() == before


def _target(link: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{link}")
    except OSError:
        return ""


def test_only_the_last_rows_are_kept(small: Path) -> None:
    snapshot = read_snapshot(small)
    first = snapshot.values(0, "taylor")
    assert snapshot.values(0, "taylor") is first
    stored.KEPT_BYTES = 0
    try:
        snapshot.values(1, "taylor")
    finally:
        stored.KEPT_BYTES = 8 << 20
    assert snapshot.values(0, "taylor") is not first


def test_metrics_of_other_programs_are_listed_after_our_own() -> None:
    snapshot = read_snapshot(VALID / "extension.h5")
    assert list(snapshot.metrics)[-4:] == ["x_demo/added", "x_demo/peak", "x_demo/count", "x_demo/flag"]
    assert snapshot.metrics["x_demo/peak"].heading == "peak"
    with chanfmt.open(VALID / "extension.h5") as atlas:
        [group] = [group for group in atlas.extensions() if group.path == "x_demo/decoder"]
        for item in group.variables:
            if item.merge:
                np.testing.assert_array_equal(snapshot.values(0, f"x_demo/{item.name}"), item.values[0])


def test_experts_are_ffns_of_their_block(tmp_path: Path) -> None:
    content = moe_content()
    snapshot = read_snapshot(moe_atlas(tmp_path / "a.h5"))
    assert snapshot.blocks == (range(1), range(1, 5), range(5, 9), range(9, 13))
    assert [ffn.expert for ffn in snapshot.ffns[:6]] == [None, 0, 1, 2, 3, 0]
    experts = content.stacks[1].variables
    for metric in ("lp", "taylor"):
        np.testing.assert_allclose(snapshot.values(6, metric), experts[metric][1, 1], rtol=1e-6)
        np.testing.assert_allclose(snapshot.span_values(range(5, 9), metric), experts[metric][1].ravel(), rtol=1e-6)
    np.testing.assert_array_equal(snapshot.labels_of(8), experts["label"][1, 3])
    assert [snapshot.tokens_of(ffn) for ffn in range(1, 5)] == experts["tokens"][0].tolist()
    assert snapshot.tokens_of(0) == content.stacks[0].variables["tokens"][0]
    assert [snapshot.block_of(ffn) for ffn in (0, 1, 4, 12)] == [0, 1, 1, 3]


def test_a_stack_without_a_metric_gives_nan(tmp_path: Path) -> None:
    snapshot = read_snapshot(atlases.without(tmp_path / "a.h5", "redundancy", "redundancy_null"))
    assert "redundancy" not in snapshot.metrics
    assert np.isnan(snapshot.values(0, "redundancy")).all()
    assert Browser(snapshot, "redundancy").metric == "lp"


def test_names_from_the_file_lose_their_control_characters(tmp_path: Path) -> None:
    snapshot = read_snapshot(atlases.with_names(tmp_path / "a.h5", "evil\x1b[31m\x07"))
    assert "\x1b" not in snapshot.model_id + snapshot.ffns[0].module


def test_an_atlas_without_any_lp_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="every value is NaN"):
        read_snapshot(atlases.with_lp(tmp_path / "a.h5", np.full((4, 96), np.nan)))
    with pytest.raises(AtlasError, match="'lp'"):
        read_snapshot(atlases.without(tmp_path / "b.h5", "lp"))


def test_find_ffns(tmp_path: Path) -> None:
    snapshot = read_snapshot(atlases.two_stacks(tmp_path / "a.h5"))
    answers = [("3", [3]), ("L3", [3]), ("layer 3", [3]), ("-64", [3, 4]), ("layers.1", [1, 4]), ("x", [])]
    for query, expected in answers:
        assert np.flatnonzero(view.match_spans(snapshot, snapshot.blocks, query)).tolist() == expected, query


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
