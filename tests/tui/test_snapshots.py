"""What every screen looks like, characters and styles, against what was looked at and kept.

Styles differ between versions of Textual, so this holds for the one in ``constraints.txt``. After a change that is
meant: ``UPDATE_SNAPSHOTS=1 pytest tests/tui/test_snapshots.py``, and read the difference.
"""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import pytest

from tests.support.browsing import press
from tests.support.factory import moe_atlas, random_atlas
from tui.app import AtlasApp
from tui.session.load import read_snapshot
from tui.session.place import Place
from tui.session.session import Session

KEPT = Path(__file__).parent / "snapshots"
PINNED = re.search(r"^textual==(\S+)$", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.MULTILINE)
CASES = {
    "overview": (Place("overview", 2), (80, 24), ""),
    "overview-wide": (Place("overview", 1), (130, 36), ""),
    "overview-index": (Place(metric="activation_power", by_index=True), (80, 24), ""),
    "overview-no-color": (Place("overview", 2), (80, 24), ""),
    "overview-light": (Place("overview", 2), (80, 24), ""),
    "experts": (Place("experts", 1), (100, 20), ""),
    "layer": (Place("layer", 1, filter="rank<30"), (80, 24), "j space j"),
    "layer-wide": (Place("layer", 3, sort="taylor"), (130, 36), ""),
    "card": (Place("card", 2), (80, 30), ""),
    "scatter": (Place("scatter", 2), (80, 24), ""),
    "scatter-no-color": (Place("scatter", 2), (80, 24), ""),
    "compare": (Place("compare"), (100, 20), ""),
    "join": (Place("join", 1), (100, 20), ""),
    "protect": (Place("layer", 1), (80, 20), "space 5 j space p"),
    "what-if": (Place("what-if"), (100, 20), "3 0 l"),
    "what-if-wide": (Place("what-if"), (130, 36), "x P"),
    "help": (Place("layer"), (80, 24), "question_mark"),
}

pytestmark = [
    pytest.mark.snapshot,
    pytest.mark.skipif(PINNED is None or version("textual") != PINNED[1], reason="kept with another Textual"),
]


def drawn(app: AtlasApp) -> str:
    """Every line, and under it a letter per cell for its style; then what the letters mean."""
    letters: dict[str, str] = {}
    lines = []
    for strip in app.screen._compositor.render_strips():
        lines.append("".join(segment.text for segment in strip))
        styles = "".join(_letter(letters, str(segment.style)) * segment.cell_length for segment in strip)
        lines.append(" ".join(f"{letter}{len(list(run))}" for letter, run in groupby(styles)))
    return "\n".join([*lines, *(f"{letter}: {style}" for style, letter in letters.items())]) + "\n"


def _letter(letters: dict[str, str], style: str) -> str:
    return letters.setdefault(style, chr(ord("a") + len(letters)))


@pytest.mark.parametrize("name", CASES)
async def test_screens_look_as_they_did(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "no-color" in name:
        monkeypatch.setenv("NO_COLOR", "1")
    place, size, keys = CASES[name]
    path = moe_atlas(tmp_path / "a.h5") if name == "experts" else random_atlas(tmp_path / "a.h5", channels=300)
    other = random_atlas(tmp_path / "b.h5", channels=300, seed=1) if place.screen in ("compare", "join") else None
    app = AtlasApp(Session(read_snapshot(path), place=place, other=other and read_snapshot(other)))
    if "light" in name:
        app.theme = "textual-light"
    async with app.run_test(size=size) as pilot:
        for key in keys.split():
            await pilot.pause()
            await press(pilot, key)
        await app.workers.wait_for_complete()
        for _ in range(3):
            await pilot.pause()
        found = drawn(app)
    kept = KEPT / f"{name}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(found)
    assert found == kept.read_text()
