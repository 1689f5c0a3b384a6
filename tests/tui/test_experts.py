"""FFNs with experts: a layer opens its experts, and an expert opens its channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from chanfmt.format.reader import Atlas
from surgery.planning.protect_file import read_protect_file
from tests.support.browsing import browser_screen, open_app, press, text_of, typed, wait_until
from tests.support.factory import moe_atlas, moe_content
from tui.app import AtlasApp
from tui.screens.compare import CompareScreen
from tui.screens.experts import ExpertsScreen
from tui.screens.layer import LayerScreen
from tui.screens.overview import OverviewScreen
from tui.screens.protect import ProtectScreen
from tui.screens.what_if import WhatIfScreen
from tui.session.load import read_snapshot
from tui.session.session import Session
from tui.widgets.lines import Lines

VALID = Path(__file__).parents[2] / "spec" / "conformance" / "valid"
sizes = pytest.mark.parametrize("size", [(80, 24), (160, 50)])


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A dense layer of 96 channels, then three of 4 experts with 24."""
    return moe_atlas(tmp_path / "moe.h5")


@sizes
async def test_a_layer_opens_its_experts(mixture: Path, size: tuple[int, int]) -> None:
    content = moe_content()
    app = open_app(mixture)
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        assert "4 FFNs × 1–4 experts × 24–96 ch" in text_of(app)
        lp = content.stacks[1].variables["lp"]
        assert app.session.browser.summaries[2].concentration.mass == pytest.approx(float(np.nansum(lp[1])), rel=1e-6)
        await press(pilot, "2", "j", "enter")
        await wait_until(lambda: isinstance(app.screen, ExpertsScreen))
        await pilot.pause()
        experts = browser_screen(app)
        assert isinstance(experts, ExpertsScreen)
        assert "layer 2" in text_of(app)
        assert "4 experts × 24 ch" in text_of(app)
        assert text_of(app).splitlines()[1].split()[:3] == ["expert▴", "tokens", "›mass"]
        assert [row.split()[1] for row in text_of(app).splitlines()[3:6]] == [
            f"{count:,}" for count in content.stacks[1].variables["tokens"][1, 1:]
        ]
        await press(pilot, "j", "enter")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        await pilot.pause()
        layer = app.screen
        assert isinstance(layer, LayerScreen)
        assert "expert 1" in text_of(app)
        assert layer.table.row_count == 24
        # The next FFN is the first expert of the next layer.
        await press(pilot, "3", "right_square_bracket")
        await pilot.pause()
        assert layer.ffn == 9
        await press(pilot, "q")
        await wait_until(lambda: app.screen is experts)
        await pilot.pause()
        assert "layer 3" in text_of(app)
        assert experts.ffn == 9
        await press(pilot, "left_square_bracket", "slash")
        await press(pilot, *"3", "enter")
        await pilot.pause()
        assert experts.ffn == 8
        await press(pilot, "2", "left_square_bracket")
        await pilot.pause()
        assert experts.ffn == 4
        await press(pilot, "right_square_bracket", "full_stop", "s", "full_stop", "S", "i", "y")
        assert app.clipboard.split("\n")[0].split("\t")[:3] == ["layer", "stack", "expert"]
        await press(pilot, "q")
        await wait_until(lambda: isinstance(app.screen, OverviewScreen))
        assert browser_screen(app).table.cursor == 2


@pytest.mark.parametrize("key", ["p", "w", "c"])
async def test_the_expert_is_kept_behind_other_screens(key: str, mixture: Path, tmp_path: Path) -> None:
    app = AtlasApp(Session(read_snapshot(mixture), other=read_snapshot(moe_atlas(tmp_path / "b.h5", calibration_seed=1))))
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(lambda: isinstance(app.screen, CompareScreen))
        await press(pilot, "q", "2", "j", "enter", "2", "j")
        await wait_until(lambda: isinstance(app.screen, ExpertsScreen))
        experts = browser_screen(app)
        await pilot.pause()
        assert experts.ffn == 7
        await press(pilot, key)
        await wait_until(lambda: isinstance(app.screen, ProtectScreen | WhatIfScreen | CompareScreen))
        await app.workers.wait_for_complete()
        await pilot.pause()
        await press(pilot, "q")
        await wait_until(lambda: app.screen is experts)
        assert experts.ffn == 7
        await press(pilot, "enter")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        layer = browser_screen(app)
        await press(pilot, "3", "j", key)
        await wait_until(lambda: isinstance(app.screen, ProtectScreen | WhatIfScreen | CompareScreen))
        await app.workers.wait_for_complete()
        await pilot.pause()
        await press(pilot, "q")
        await wait_until(lambda: app.screen is layer)
        assert (layer.ffn, layer.table.cursor) == (7, 3)
        await press(pilot, "y")
        names, values = app.clipboard.rstrip("\n").split("\n")
        assert dict(zip(names.split("\t"), values.split("\t"), strict=True))["expert"] == "2"
        await press(pilot, key)
        await wait_until(lambda: isinstance(app.screen, ProtectScreen | WhatIfScreen | CompareScreen))
        await app.workers.wait_for_complete()
        await pilot.pause()
        await press(pilot, "j", "q")
        await wait_until(lambda: app.screen is layer)
        assert layer.ffn == 9


async def test_from_an_expert_to_a_dense_layer_and_back(mixture: Path) -> None:
    app = open_app(mixture)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(pilot, "j", "enter")
        await wait_until(lambda: isinstance(app.screen, ExpertsScreen))
        await press(pilot, "enter")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        await press(pilot, "left_square_bracket", "q")
        await wait_until(lambda: isinstance(app.screen, OverviewScreen))
        assert browser_screen(app).table.cursor == 0


@sizes
async def test_marks_of_experts_reach_surgery(mixture: Path, size: tuple[int, int]) -> None:
    app = open_app(mixture)
    async with app.run_test(size=size) as pilot:
        await press(pilot, "2", "j", "enter", "2", "j", "enter")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        await pilot.pause()
        await press(pilot, "V", "2", "j", "space", "p")
        await wait_until(lambda: isinstance(app.screen, ProtectScreen))
        await pilot.pause()
        marked = np.flatnonzero(app.session.marks.of(7)).tolist()
        assert len(marked) == 3
        assert " ".join(f"2:{channel}" for channel in marked) in text_of(app)
        assert "layer 2 decoder.experts: 3 channels" in app.screen.query_one("#status", Lines).text
        await press(pilot, "W")
        await wait_until(lambda: not any(app.session.marks.unsaved))
        with Atlas.open(mixture) as atlas:
            masks, _ = read_protect_file(app.session.protect_file, atlas)
        assert [tuple(place) for place in np.argwhere(masks[2])] == [(2, channel) for channel in marked]
        assert sum(int(mask.sum()) for mask in masks.values()) == 3
        await press(pilot, "o")
        await pilot.pause()
        assert app.session.marks.counts[7] == 3
        await typed(pilot, "plus", "supernodes")
        await wait_until(lambda: sum(app.session.marks.counts) > 3)
        await press(pilot, "x")
        await pilot.pause()
        assert sum(app.session.marks.counts[5:9]) == 0
        await press(pilot, "u")
        await pilot.pause()
        assert app.session.marks.counts[7] > 0
        await press(pilot, "w")
        await wait_until(lambda: isinstance(app.screen, WhatIfScreen) and app.screen.table.row_count == 4)
        await press(pilot, "P", "P", "P")
        await wait_until(lambda: "marks" in text_of(app).splitlines()[0] and app.screen.table.row_count == 4)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "name",
    [
        "experts",
        "stacked-experts",
        "shared",
        "ragged",
        "used-twice",
        "interleaved",
        "extension",
        "no-redundancy",
        "encoder-decoder",
    ],
)
async def test_every_shape_of_the_conformance_files(name: str) -> None:
    app = open_app(VALID / f"{name}.h5")
    async with app.run_test(size=(110, 24)) as pilot:
        for row in range(len(app.session.browser.snapshot.blocks)):
            await press(pilot, "g", *str(row + 1), "G")
            block = app.screen.table.span  # type: ignore[attr-defined]
            await press(pilot, "enter")
            await pilot.pause()
            if isinstance(app.screen, ExpertsScreen):
                await press(pilot, "enter")
                await pilot.pause()
            assert isinstance(app.screen, LayerScreen)
            assert app.screen.ffn in block
            await press(pilot, "G", "s", "p")
            await wait_until(lambda: isinstance(app.screen, ProtectScreen))
            await press(pilot, "q", "w")
            await wait_until(lambda: isinstance(app.screen, WhatIfScreen))
            await press(pilot, "q", "q")
            await pilot.pause()
            if isinstance(app.screen, ExpertsScreen):
                await press(pilot, "q")
                await pilot.pause()
            assert isinstance(app.screen, OverviewScreen)
