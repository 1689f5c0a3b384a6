"""Numbers that people type back, such as channel ids, have no separators: --protect reads 1,270 as channels 1 and 270."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tests.support.browsing import in_layer, open_app, press, text_of, wait_until
from tests.support.factory import random_atlas
from tui.screens.card import CardScreen

if TYPE_CHECKING:
    from pathlib import Path

_GROUPED = re.compile(r"\d,\d{3}(?! ch\b)(?! of \d)(?<!of \d,\d{3})")
"""A number with separators that does not count channels."""


async def test_ids_ranks_and_rows_have_no_separators(tmp_path: Path) -> None:
    app = open_app(random_atlas(tmp_path / "a.h5", layers=2, channels=1500))
    async with app.run_test(size=(160, 50)) as pilot:
        await press(pilot, "i")
        await wait_until(lambda: "channels by index" in text_of(app))
        assert " 1499" in text_of(app)
        layer = await in_layer(pilot, app)
        await press(pilot, "G")
        await wait_until(lambda: "row 1500/1500" in text_of(app))
        lines = [line for line in text_of(app).splitlines() if _GROUPED.search(line) and "n_eff" not in line]
        assert not lines, lines
        channel = layer.table.channel
        await press(pilot, "enter")
        await wait_until(lambda: isinstance(app.screen, CardScreen))
        assert f"channel {channel}" in text_of(app) or f"ch {channel}" in text_of(app)
        assert " 1500 " in text_of(app)
