"""The what-if screen: every key, and the numbers of the plan."""

from __future__ import annotations

import json
import shlex
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from chanfmt.format.reader import Atlas
from chanfmt.format.writer import write_atlas
from surgery.cli.main import main
from surgery.planning.methods import METHODS
from surgery.planning.options import ALLOCATIONS, PlanOptions
from surgery.planning.plan import make_plan
from surgery.planning.what_if import WhatIf
from tests.support.browsing import open_app, press, text_of, wait_until
from tests.support.factory import random_atlas, random_content, with_fields
from tui.screens.layer import LayerScreen
from tui.screens.protect import ProtectScreen
from tui.screens.what_if import WhatIfScreen
from tui.session.scenario import Scenario

if TYPE_CHECKING:
    from pathlib import Path

    from textual.pilot import Pilot

    from tui.app import AtlasApp

SIZES = [(80, 24), (160, 50)]


async def asked(pilot: Pilot[None], app: AtlasApp) -> WhatIfScreen:
    await press(pilot, "w")
    await wait_until(lambda: isinstance(app.screen, WhatIfScreen) and app.screen.table.row_count > 0)
    await pilot.pause()
    screen = app.screen
    assert isinstance(screen, WhatIfScreen)
    return screen


@pytest.mark.parametrize("size", SIZES)
async def test_every_key(atlas: Path, size: tuple[int, int]) -> None:
    app = open_app(atlas)
    async with app.run_test(size=size) as pilot:
        screen = await asked(pilot, app)
        for keys, shown in [
            ("l", "51% cut"),
            ("h h", "49% cut"),
            ("L", "54% cut"),
            ("H H", "44% cut"),
            ("3 5 l", "35% cut"),
            ("7 h", "7% cut"),
            ("H H", "1% cut"),
            ("9 9 l", "95% cut"),
            ("5 0 l", "50% cut"),
            ("x", "scar-conn"),
            ("X X", "scar-lp"),
            ("X", "random"),
            ("x x", "scar-prot"),
            ("o", "global"),
            ("o", "uniform"),
            ("P", "protected: sup"),
            ("P", "protected: sup"),
            ("P", "protected: none"),
        ]:
            await press(pilot, *keys.split())
            await wait_until(lambda shown=shown: shown in text_of(app).splitlines()[0])
        await press(pilot, "full_stop", "s", "3", "j", "enter")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        layer = app.screen
        assert isinstance(layer, LayerScreen)
        ffn = layer.ffn
        await press(pilot, "q")
        await wait_until(lambda: app.screen is screen)
        assert screen.ffn == ffn
        await press(pilot, "p")
        await wait_until(lambda: isinstance(app.screen, ProtectScreen))
        assert len(app.screen_stack) == 2


async def test_the_numbers_are_the_plan_s(atlas: Path) -> None:
    app = open_app(atlas)
    async with app.run_test(size=(160, 50)) as pilot:
        screen = await asked(pilot, app)
        await press(pilot, "P", "6", "3", "l")
        await wait_until(lambda: screen.table.rows[0].supernodes_kept == screen.table.rows[0].supernodes)
        with Atlas.open(atlas) as opened:
            plan = make_plan(opened, PlanOptions(0.63, protect=("supernodes",)))
        for row, block in zip(screen.table.rows, plan.blocks, strict=True):
            assert (row.channels_kept, row.supernodes_kept) == (block.n_kept, block.supernodes_kept)
            assert row.lp_share == pytest.approx(block.lp_kept)
        assert f"{plan.channels_kept:,} of {plan.channels:,} ch" in text_of(app)


async def test_marks_count_and_the_command_runs(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app = open_app(small)
    async with app.run_test(size=(160, 50)) as pilot:
        app.session.mark({0: np.arange(60)}, "many", on=True)
        screen = await asked(pilot, app)
        await press(pilot, "P", "P", "P")
        await wait_until(lambda: "protected: marks" in text_of(app))
        await press(pilot, "8", "0", "l")
        await wait_until(lambda: "do not fit" in text_of(app))
        assert screen.table.row_count == 0
        await press(pilot, "5", "l")
        await wait_until(lambda: bool(screen.table.rows) and screen.table.rows[0].channels_kept == 64)
        await press(pilot, "y")
        await pilot.pause()
        assert "press W to write the marks" in text_of(app)
        await press(pilot, "W")
        await wait_until(lambda: not any(app.session.marks.unsaved))
        command = shlex.split(app.clipboard)
        assert command[:2] == ["surgery", "prune"]
        rows = screen.table.rows
    assert main([*command[1:], "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    # The marks, and one supernode of each of the four layers.
    assert planned["protected"] == 64
    assert [layer["kept"] for layer in planned["layers"]] == [row.channels_kept for row in rows]
    assert [layer["lp_kept"] for layer in planned["layers"]] == pytest.approx([row.lp_share for row in rows])


async def test_what_cannot_be_asked_is_said(tmp_path: Path) -> None:
    app = open_app(random_atlas(tmp_path / "a.h5", channels=320))
    async with app.run_test(size=(80, 24)) as pilot:
        await asked(pilot, app)
        await press(pilot, "o", "9", "0", "l")
        await wait_until(lambda: "--max-layer-sparsity" in text_of(app))
        # A search has a refusal of its own, which is not that of the cut.
        await press(pilot, "slash", "1")
        await pilot.pause()
        await press(pilot, "escape")
        await wait_until(lambda: "--max-layer-sparsity" in text_of(app))


async def test_the_numbers_of_parameters_are_those_of_prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They count zero channels, and the command for a cut of zeros allows them."""
    path = tmp_path / "a.h5"
    write_atlas(with_fields(random_content(channels=320), {"decoder": ("intermediate_size", 1)}), path)
    app = open_app(path)
    async with app.run_test(size=(160, 50)) as pilot:
        screen = await asked(pilot, app)
        await press(pilot, "5", "0", "l")
        await wait_until(lambda: "parameters" in text_of(app))
        shown = text_of(app)
        assert " parameters" in shown.splitlines()[1]
        assert "--allow-padding" not in shown + screen.copy_text()
    assert main(["plan", str(path), "--sparsity", "0.5"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("parameters")]
    before, after = line.split()[1], line.split()[3].rstrip(",")
    assert f"{before} to {after} parameters" in shown
    assert f"{93_160 - 4 * 160 * 72:,})" in line
    # A model whose class has no field for the width: its file would not shrink.
    write_atlas(with_fields(random_content(channels=320), {"decoder": ("", 0)}), path)
    app = open_app(path)
    async with app.run_test(size=(160, 50)) as pilot:
        screen = await asked(pilot, app)
        await wait_until(lambda: "needs --allow-padding" in text_of(app))
        assert "--allow-padding" in screen.copy_text()
        assert "93.2K to 93.2K parameters, no smaller" in text_of(app).splitlines()[1]
    arguments = ["prune", str(path), "--sparsity", "0.5", "--dry-run"]
    assert main(arguments) == 2
    assert "the file would shrink by" in capsys.readouterr().err
    assert main([*arguments, "--allow-padding"]) == 0


async def test_the_title_says_all_that_is_protected(small: Path) -> None:
    path = small.rename(small.with_name("Meta-Llama-3-8B-Instruct.h5"))
    app = open_app(path)
    async with app.run_test(size=(80, 24)) as pilot:
        app.session.mark({0: np.arange(9)}, "some", on=True)
        await asked(pilot, app)
        for text in ("supernodes", "supernodes+halo", "marks", "supernodes + marks", "supernodes+halo + marks", "none"):
            await press(pilot, "P")
            await wait_until(lambda text=text: f"protected: {text}  " in text_of(app).splitlines()[0])


async def test_numbers_keep_their_title(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> WhatIf:
        begun.set()
        assert go_on.wait(10)
        return WhatIf(*arguments)

    app = open_app(small)
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await asked(pilot, app)
        monkeypatch.setattr("tui.session.scenario.WhatIf", slow)
        await press(pilot, "x")
        await wait_until(begun.is_set)
        await press(pilot, "l", "y")
        await pilot.pause()
        assert "scar-prot" in text_of(app).splitlines()[0]
        assert "51% cut" in text_of(app).splitlines()[0]
        assert "--method scar-prot --sparsity 0.51" in app.clipboard
        assert screen.table.row_count == 4
        go_on.set()
        await wait_until(lambda: "scar-conn" in text_of(app).splitlines()[0])


async def test_an_answer_for_a_closed_screen_is_dropped(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def slow(*arguments: Any) -> WhatIf:
        begun.set()
        assert go_on.wait(10)
        ended.set()
        return WhatIf(*arguments)

    app = open_app(small)
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await asked(pilot, app)
        monkeypatch.setattr("tui.session.scenario.WhatIf", slow)
        await press(pilot, "x")
        await wait_until(begun.is_set)
        await press(pilot, "q")
        await wait_until(lambda: app.screen is not screen)
        go_on.set()
        await wait_until(ended.is_set)
        await app.workers.wait_for_complete()
        for _ in range(3):
            await pilot.pause()
        await press(pilot, "j")
        assert app.is_running
        assert app.return_code in (None, 0)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_commands(allocation: str) -> None:
    for method in METHODS:
        scenario = Scenario(method, ("supernodes",), True, allocation, 35)
        command = scenario.command("a b.h5", "p.json")
        start = f"surgery prune 'a b.h5' --method {method} --sparsity 0.35 --protect supernodes --protect p.json"
        assert command.startswith(start)
        assert command.endswith(" --allocation global") == (allocation == "global")
    # The screen opens with what `surgery plan` does if only a sparsity is given.
    assert Scenario().options == PlanOptions(0.5)
    names = {Scenario().next_method(step).method for step in range(len(METHODS))}
    assert names == set(METHODS)
