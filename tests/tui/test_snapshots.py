"""Every screen as a picture (SVG: characters, styles, colours), compared with the picture that somebody has looked at.

Pictures differ between versions of Textual, so they hold for the version in ``constraints.txt`` only. After a change that
is meant, run ``pytest tests/tui/test_snapshots.py --snapshot-update``, and look at the pictures that have changed.
"""

from __future__ import annotations

import re
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support.browsing import press
from tests.support.factory import moe_atlas, random_atlas
from tui.app import AtlasApp
from tui.session.load import read_snapshot
from tui.session.place import Place
from tui.session.registry import OF_TWO, SCREENS
from tui.session.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable

    from textual.pilot import Pilot

pytest.importorskip("pytest_textual_snapshot")

PINNED = re.search(r"^textual==(\S+)$", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.MULTILINE)
SMALL, WIDE = (80, 24), (130, 36)


class Case(NamedTuple):
    """One picture.

    Attributes:
        place: The first screen.
        size: Columns and rows.
        keys: Keys to press, separated by spaces.
        file: Name of the atlas.
    """

    place: Place
    size: tuple[int, int] = SMALL
    keys: str = ""
    file: str = "a.h5"


CASES = {
    # Every screen of the registry has a picture, new screens included.
    **{name: Case(Place(name, 1)) for name in SCREENS},
    "overview": Case(Place("overview", 2)),
    "overview-wide": Case(Place("overview", 1), WIDE),
    "overview-index": Case(Place(metric="activation_power", by_index=True)),
    "overview-no-color": Case(Place("overview", 2)),
    "overview-light": Case(Place("overview", 2)),
    "overview-cjk": Case(Place("overview", 2), file="模型-テスト.h5"),
    "experts": Case(Place("experts", 1), (100, 20)),
    "layer": Case(Place("layer", 1, filter="rank<30"), keys="j space j"),
    "layer-wide": Case(Place("layer", 3, sort="taylor"), WIDE),
    "card": Case(Place("card", 2), (80, 30)),
    "scatter": Case(Place("scatter", 2)),
    "scatter-no-color": Case(Place("scatter", 2)),
    "compare": Case(Place("compare"), (100, 20)),
    "join": Case(Place("join", 1), (100, 20)),
    "protect": Case(Place("layer", 1), (80, 20), "space 5 j space p"),
    "what-if": Case(Place("what-if"), (100, 20), "3 0 l"),
    "what-if-wide": Case(Place("what-if"), WIDE, "x P"),
    "help": Case(Place("layer"), keys="question_mark"),
}

pytestmark = [
    pytest.mark.snapshot,
    pytest.mark.skipif(PINNED is None or version("textual") != PINNED[1], reason="the pictures hold for another Textual"),
]


@pytest.mark.parametrize("name", CASES)
def test_screens_look_as_they_did(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snap_compare: Callable[..., bool]
) -> None:
    if "no-color" in name:
        monkeypatch.setenv("NO_COLOR", "1")
    case = CASES[name]
    path = tmp_path / case.file
    path = moe_atlas(path) if name == "experts" else random_atlas(path, channels=300)
    other = random_atlas(tmp_path / "b.h5", channels=300, seed=1) if case.place.screen in OF_TWO else None
    app = AtlasApp(Session(read_snapshot(path), place=case.place, other=other and read_snapshot(other)))
    if "light" in name:
        app.theme = "textual-light"
    assert snap_compare(app, terminal_size=case.size, run_before=partial(_use, keys=case.keys))


async def _use(pilot: Pilot[None], *, keys: str) -> None:
    for key in keys.split():
        await pilot.pause()
        await press(pilot, key)
    await pilot.app.workers.wait_for_complete()
    for _ in range(3):
        await pilot.pause()
