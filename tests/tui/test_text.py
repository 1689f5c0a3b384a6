"""Text in cells: characters that are two cells wide keep every column in its place, and no sentence of the help is cut."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from rich.cells import cell_len

from chanfmt.format.reader import Atlas
from tests.support import browsed as atlases
from tests.support.browsing import press, text_of, wait_until
from tests.support.factory import random_atlas
from tui.app import AtlasApp
from tui.screens.help import HelpScreen
from tui.session.load import Snapshot, read_snapshot
from tui.session.place import Place
from tui.session.registry import OF_TWO, SCREENS
from tui.session.session import Session
from tui.widgets.text import left, right, spread, wrapped

if TYPE_CHECKING:
    from pathlib import Path

WIDE_NAME = "解码器"


def test_cells_not_characters() -> None:
    assert left("字a", 5) == "字a  "
    assert left("字字字", 5) == "字字 "
    assert right("字", 5) == "   字"
    assert right("字字字", 5) == "字字字"
    assert spread("字字", "end", 9) == "字字  end"
    assert spread("字字字", "end", 9) == "字字  end"
    assert spread("字字字", "", 4) == "字字"
    for width in range(20):
        assert cell_len(spread("模型 abc", "層 x", width)) <= width


def test_wrapped_by_cells() -> None:
    assert wrapped("the cut keeps 字字字", 9) == ["the cut", "keeps", "字字字"]
    assert wrapped("字字字字字 a", 5) == ["字字", "字字", "字 a"]
    assert wrapped("", 5) == []
    for width in range(2, 30):
        lines = wrapped("surgery prune 模型.h5 --protect 模型.protect.json --sparsity 0.5", width)
        assert all(cell_len(line) <= width for line in lines)
        assert "".join(lines).replace(" ", "") == "surgeryprune模型.h5--protect模型.protect.json--sparsity0.5"


def renamed(snapshot: Snapshot) -> Snapshot:
    """``snapshot`` with wide names of its model, its second stack and its LP."""

    def name(stack: str) -> str:
        return WIDE_NAME if stack == "decoder-64" else stack

    return replace(
        snapshot,
        model_id="模型-名前",
        metrics={
            key: replace(metric, heading="損失" if key == "lp" else metric.heading) for key, metric in snapshot.metrics.items()
        },
        ffns=tuple(replace(ffn, stack=name(ffn.stack)) for ffn in snapshot.ffns),
        lp={name(stack): values for stack, values in snapshot.lp.items()},
        labels={name(stack): values for stack, values in snapshot.labels.items()},
        tokens={name(stack): values for stack, values in snapshot.tokens.items()},
        supports={name(stack): values for stack, values in snapshot.supports.items()},
        places={(name(stack), key): place for (stack, key), place in snapshot.places.items()},
    )


@pytest.mark.parametrize("size", [(80, 24), (160, 50)])
@pytest.mark.parametrize("screen", ["overview", "layer", "card", "scatter", "protect"])
async def test_wide_names_keep_the_columns(screen: str, size: tuple[int, int], tmp_path: Path) -> None:
    snapshot = renamed(read_snapshot(atlases.two_stacks(tmp_path / "模型-テスト.h5")))
    app = AtlasApp(Session(snapshot, place=Place(screen, 4)))
    async with app.run_test(size=size) as pilot:
        await app.workers.wait_for_complete()
        for _ in range(3):
            await pilot.pause()
        rows = text_of(app).splitlines()
        assert [cell_len(row) for row in rows] == [size[0]] * size[1]
        assert "模型-テスト.h5" in rows[0]
        assert rows[0].rstrip().endswith(screen)
        if screen in ("overview", "protect"):
            assert WIDE_NAME in text_of(app)
            table = rows[2:7]
            ends = {cell_len(row[: row.index("%") + 1]) for row in table}
            assert len(ends) == 1, table


@pytest.mark.parametrize("screen", SCREENS)
async def test_no_sentence_of_the_help_is_cut_at_the_design_size(screen: str, tmp_path: Path) -> None:
    other = read_snapshot(random_atlas(tmp_path / "b.h5", seed=1)) if screen in OF_TWO else None
    app = AtlasApp(Session(read_snapshot(random_atlas(tmp_path / "a.h5")), place=Place(screen, 1), other=other))
    async with app.run_test(size=(80, 24)) as pilot:
        await app.workers.wait_for_complete()
        for _ in range(3):
            await pilot.pause()
        await press(pilot, "question_mark")
        await wait_until(lambda: isinstance(app.screen, HelpScreen))
        await pilot.pause()
        assert isinstance(app.screen, HelpScreen)
        shown = app.screen.query_one("#help").text  # type: ignore[attr-defined]
        assert [row.sentence for row in app.screen.rows if row.sentence not in shown] == []


@pytest.mark.parametrize("names", [("a\x07", "a\x1b"), ("a\x1b", "a\ufffd"), ("a\nb", "a b")])
async def test_names_that_differ_in_control_characters_only(names: tuple[str, str], tmp_path: Path) -> None:
    path = atlases.two_stacks(tmp_path / "a.h5", names=names)
    with Atlas.open(path) as atlas:
        expected = {
            (block.layer_index, block.n_channels): atlas.stacks[block.stack].row("lp", block.row) for block in atlas.blocks
        }
    snapshot = read_snapshot(path)
    assert len(snapshot.labels) == len({ffn.stack for ffn in snapshot.ffns}) == 2
    assert all(name.isprintable() for name in snapshot.labels)
    for number, ffn in enumerate(snapshot.ffns):
        np.testing.assert_array_equal(snapshot.values(number, "lp"), expected[ffn.layer_index, ffn.n_channels])
    app = AtlasApp(Session(snapshot))
    async with app.run_test(size=(120, 24)):
        await app.workers.wait_for_complete()
        shown = text_of(app)
    assert all(name in shown for name in snapshot.labels)
