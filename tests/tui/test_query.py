"""One filter over all layers: what it chooses against the filter of each layer, its order, and its screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from textual.widgets import Input

from tests.support.browsed import two_stacks
from tests.support.browsing import in_layer, open_app, press, text_of, wait_until
from tests.support.factory import moe_atlas
from tui.screens.card import CardScreen
from tui.screens.layer import LayerScreen
from tui.screens.query import QueryScreen
from tui.session import query, view
from tui.session.filter import filtered
from tui.session.load import read_snapshot
from tui.session.model import Browser
from tui.session.place import Place
from tui.session.query import ModelChannels

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from textual.pilot import Pilot

    from tui.app import AtlasApp


@pytest.mark.parametrize("make", [moe_atlas, two_stacks])
def test_a_query_chooses_what_the_filter_of_each_layer_chooses(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    browser = Browser(read_snapshot(make(tmp_path / "a.h5")), "taylor")
    channels = ModelChannels(browser)
    ffns = browser.snapshot.ffns
    marked = np.zeros(len(channels), dtype=bool)
    marked[::7] = True
    for text in ("lp>1 & super", "rank<=3 | halo", "share>2% & !marked", "cumulative<0.5 & channel>4", "marked"):
        found = channels.by_ffn(channels.find(text, marked))
        for ffn in range(len(ffns)):
            own = marked[channels.position(ffn, 0) :][: ffns[ffn].n_channels]
            keep = filtered(text, browser.columns(ffn), browser.snapshot.labels_of(ffn), {"marked": own})
            assert found.get(ffn, np.zeros(0)).tolist() == np.flatnonzero(keep).tolist(), (text, ffn)
    last = channels.find(f"layer>={ffns[-1].layer_index}", marked)
    assert {ffns[ffn].layer_index for ffn in channels.by_ffn(last)} == {ffns[-1].layer_index}
    positions = [channels.at(position) for position in range(len(channels))]
    assert positions == [(ffn, channel) for ffn in range(len(ffns)) for channel in range(ffns[ffn].n_channels)]
    for ffn, channel in positions[:: len(positions) // 9]:
        at = channels.position(ffn, channel)
        assert float(channels.columns["lp"][at]) == pytest.approx(browser.snapshot.value(ffn, channel, "lp"), nan_ok=True)
        assert channels.columns["taylor"][at] == pytest.approx(browser.snapshot.value(ffn, channel, "taylor"), nan_ok=True)


@pytest.mark.parametrize("descending", [True, False])
def test_the_first_rows_are_those_of_the_whole_order(descending: bool) -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 40, 500).astype(np.float32)
    values[random.integers(0, 500, 60)] = np.nan
    for count in (1, 77, 450, 499, 500, 600):
        whole = view.order_by(values, descending=descending)
        assert query._first(values, count, descending=descending).tolist() == whole[:count].tolist()


async def filtered_by(pilot: Pilot[None], app: AtlasApp, text: str) -> None:
    await press(pilot, "f")
    await pilot.pause()
    app.screen.query_one("#find", Input).value = text
    await press(pilot, "enter")
    await settled(pilot, app)


async def settled(pilot: Pilot[None], app: AtlasApp) -> None:
    await app.workers.wait_for_complete()
    for _ in range(2):
        await pilot.pause()


async def test_the_query_screen(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = open_app(small)
    async with app.run_test(size=(160, 50)) as pilot:
        layer = await in_layer(pilot, app, "j")
        layer.filter_text = "rank<=2"
        await press(pilot, "F")
        await wait_until(lambda: isinstance(app.screen, QueryScreen) and app.screen.table.row_count == 8)
        screen = app.screen
        assert isinstance(screen, QueryScreen)
        assert "rank<=2   8 of 384 ch" in text_of(app), "the filter of the layer goes on over all layers"
        lp = app.session.browser.snapshot.lp["decoder"]
        assert screen.table.channels.columns["lp"][screen.table.order].tolist() == sorted(
            np.sort(lp, axis=1)[:, -2:].ravel().tolist(), reverse=True
        )
        # A wrong filter may be corrected, and the count follows what is typed.
        await filtered_by(pilot, app, "lq>1")
        assert screen.has_class("-finding")
        assert "unknown column 'lq'" in text_of(app)
        await press(pilot, "escape")
        await filtered_by(pilot, app, "layer>=2 & super")
        assert screen.filter_text == "layer>=2 & super"
        assert {screen.table.channels.at(position)[0] for position in screen.table.order.tolist()} == {2, 3}
        # Marks of a row and of everything found, the rows beyond the limit too.
        monkeypatch.setattr(query, "MOST_ROWS", 1)
        await press(pilot, "s")
        await settled(pilot, app)
        assert (screen.table.row_count, len(screen.table.found)) == (1, 2)
        await press(pilot, "a")
        await pilot.pause()
        assert app.session.marks.counts == [0, 0, 1, 1]
        assert "●SUPER" in text_of(app)
        await press(pilot, "space")
        await pilot.pause()
        assert sum(app.session.marks.counts) == 1
        monkeypatch.undo()
        channel = screen.table.place
        await press(pilot, "enter")
        await wait_until(lambda: isinstance(app.screen, CardScreen))
        assert isinstance(app.screen, CardScreen)
        assert (app.screen.ffn, app.screen.channel) == channel
        assert app.screen.place.options == ["--screen", "card", "--layer", str(channel[0]), "--channel", str(channel[1])]
        await press(pilot, "q", "o")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        await pilot.pause()
        assert (app.screen.ffn, app.screen.table.channel) == channel  # type: ignore[attr-defined]
        await press(pilot, "q", "q")
        await wait_until(lambda: app.screen is layer)


async def test_a_query_comes_back(small: Path) -> None:
    place = Place("query", filter="lp>0.001 & !marked", sort="taylor:up")
    app = open_app(small, place)
    async with app.run_test(size=(80, 24)) as pilot:
        await settled(pilot, app)
        screen = app.screen
        assert isinstance(screen, QueryScreen)
        app.session.mark({0: np.array([3, 5])}, "two", on=True)
        await settled(pilot, app)
        shown = [screen.table.channels.at(position) for position in screen.table.order.tolist()]
        assert (0, 3) not in shown
        found: dict[str, list[tuple[int, int]]] = {}
        exec(app.session.rebuilt(screen.place, screen.ffn), found)
        assert found["rows"] == shown
        assert "--filter 'lp>0.001 & !marked'" in app.session.rebuilt(screen.place, screen.ffn)
        # The query that chooses nothing any more shows everything, and says why.
        await filtered_by(pilot, app, "marked")
        await press(pilot, "u")
        await settled(pilot, app)
        assert screen.table.row_count == 384
        assert "no channel of the model fits 'marked'" in text_of(app)
