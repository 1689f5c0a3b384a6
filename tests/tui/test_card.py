"""The channel's card and the scatter: their numbers against independent ones, and every key."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy import stats
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel

from chanfmt.algebra.columns import with_columns
from chanfmt.analysis.token_texts import visible
from chanfmt.format.columns import ARRAY_BY_NAME
from chanfmt.format.writer import write_atlas
from tests.support.browsing import in_layer, open_app, press, text_of, wait_until
from tests.support.factory import moe_atlas, random_content
from tui.app import AtlasApp
from tui.screens.card import CardScreen, about_lines, card_lines
from tui.screens.choice import ChoiceScreen
from tui.screens.layer import LayerScreen
from tui.screens.scatter import ScatterScreen
from tui.session.card import make_card
from tui.session.filter import filtered
from tui.session.load import read_snapshot
from tui.session.place import Place
from tui.session.scatter import make_scatter
from tui.session.session import Session
from tui.session.texts import MISSING, READING
from tui.widgets import plots

if TYPE_CHECKING:
    from textual.pilot import Pilot

VALID = Path(__file__).parents[2] / "spec" / "conformance" / "valid"
sizes = pytest.mark.parametrize("size", [(80, 24), (160, 50)])


def test_a_card_says_what_the_arrays_say(small: Path) -> None:
    variables = random_content().stacks[0].variables
    snapshot = read_snapshot(small)
    for channel in (0, 17, int(variables["lp"][2].argmax())):
        card = make_card(snapshot, 2, channel)
        for item in card.metrics:
            values = variables[item.name][2].astype(np.float32)
            assert item.value == pytest.approx(float(values[channel]), rel=1e-6)
            assert item.rank == stats.rankdata(-values, "min")[channel]
            assert item.below == pytest.approx(stats.percentileofscore(values, values[channel], "strict") / 100)
        split_lp = 0.5 * variables["sum_q2_split"][:, 2] / variables["tokens_split"][:, 2, None]
        assert [split.lp for split in card.splits] == pytest.approx(split_lp[:, channel].tolist())
        assert [split.rank for split in card.splits] == [stats.rankdata(-row, "min")[channel] for row in split_lp]
        assert [split.supernode for split in card.splits] == [row.argmax() == channel for row in split_lp]
        assert card.variation == pytest.approx(stats.variation(split_lp[:, channel], ddof=1))
        assert [size for size, _, _ in card.supports] == list(random_content().stacks[0].supports)
        assert [share for _, share, _ in card.supports] == pytest.approx(variables["connectivity_at"][:, 2, channel].tolist())


def test_a_card_names_partners_and_dimensions(small: Path) -> None:
    variables = random_content().stacks[0].variables
    snapshot = read_snapshot(small)
    for channel in (3, 40):
        card = make_card(snapshot, 1, channel)
        ids = [value for value in variables["redundancy_partner"][:, 1, channel].tolist() if value >= 0]
        assert [name for name, _, _ in card.partners] == ids
        lp = variables["lp"][1]
        assert [rank for _, _, rank in card.partners] == [stats.rankdata(-lp, "min")[name] for name in ids]
        assert [name for name, _ in card.dimensions] == variables["write_dimension"][:, 1, channel].tolist()
        assert [share for _, share in card.dimensions] == pytest.approx(variables["write_share"][:, 1, channel].tolist())
    assert make_card(read_snapshot(VALID / "no-redundancy.h5"), 0, 1).partners == ()
    invalid = VALID.parent / "invalid" / "E311-partner.h5"  # It names channel 8 of 8.
    assert 8 not in [name for name, _, _ in make_card(read_snapshot(invalid), 0, 1).partners]


def test_a_card_of_an_expert_and_of_one_that_no_token_reached(tmp_path: Path) -> None:
    snapshot = read_snapshot(moe_atlas(tmp_path / "a.h5"))
    assert len(make_card(snapshot, 5, 3).splits) == 8
    idle = next(ffn for ffn in range(1, 13) if not snapshot.tokens_of(ffn))
    card = make_card(snapshot, idle, 3)
    assert card.metrics[0].rank == 0
    assert all(split.rank == 0 for split in card.splits)
    assert np.isnan(card.variation)


def test_scatter_against_scipy() -> None:
    random = np.random.default_rng(0)
    x = np.exp(random.normal(size=500)).astype(np.float32)
    y = (x * np.exp(random.normal(size=500))).astype(np.float32)
    x[:3], y[5] = (0.0, -1.0, np.nan), 0.0
    scatter = make_scatter(x, y, 0.02, log=True)
    known = np.isfinite(x)
    assert scatter.correlation == pytest.approx(stats.spearmanr(x[known], y[known]).statistic)
    tops = [set(np.argsort(-np.nan_to_num(values, nan=-9))[:10]) for values in (x, y)]
    assert (scatter.top, scatter.shared) == (10, len(tops[0] & tops[1]))
    assert scatter.jaccard == pytest.approx(len(tops[0] & tops[1]) / len(tops[0] | tops[1]))
    assert scatter.left_out == 4
    assert scatter.ranges[0] == pytest.approx((np.log10(x[scatter.channels].min()), np.log10(x[scatter.channels].max())))
    ranks = make_scatter(x, y, 0.02, log=False)
    assert ranks.left_out == 1
    assert np.argmax(ranks.x) == np.argmax(x[ranks.channels])


def test_a_column_that_few_channels_have_a_value_of(tmp_path: Path) -> None:
    """Card, scatter and filter of a measured loss: what was not measured has no rank, and is in no top set."""
    content = random_content()
    lp = content.stacks[0].variables["lp"]
    loss = np.full(lp.shape, np.nan, dtype=np.float32)
    order = np.argsort(-lp[1], kind="stable")
    loss[1, order[:4]] = [0.1, -0.2, 0.3, 0.4]
    name = "x_common/ablation_loss"
    write_atlas(with_columns(content, {name: {"decoder": loss}}), tmp_path / "a.h5")
    snapshot = read_snapshot(tmp_path / "a.h5")
    assert snapshot.metrics[name].heading == "ablation"
    standing = {channel: make_card(snapshot, 1, channel).metrics[-1] for channel in (int(order[2]), int(order[9]))}
    measured, other = standing.values()
    assert (measured.name, measured.rank, measured.known, measured.below) == (name, 2, 4, 0.5)
    assert (other.rank, other.known) == (0, 4)
    # The card has the whole name of a column, and says what it was measured on.
    card = make_card(snapshot, 1, int(order[2]))
    types = {name: metric.dtype for name, metric in snapshot.metrics.items()}
    names = [line[0][0].split()[0] for line in card_lines(card, 78, types) if line]
    assert name in names
    about = about_lines({name: "a loss; measured on pydoc, 16384 tokens"}, card, 78)
    assert about[1] == [(f" {name}: measured on pydoc, 16384 tokens", "dim")]
    assert not about_lines({name: "a loss; measured on pydoc"}, make_card(snapshot, 1, int(order[9])), 78)
    values = snapshot.values(1, name)
    scatter = make_scatter(snapshot.values(1, "lp"), values, 0.1, log=False)
    assert (scatter.top, scatter.shared, scatter.left_out) == (4, 4, len(values) - 4)
    assert sorted(scatter.channels.tolist()) == sorted(order[:4].tolist())
    columns = {"lp": snapshot.values(1, "lp"), name: values}
    labels = snapshot.labels["decoder"][1]
    chosen = filtered(f"{name}>0.2", columns, labels, {})
    assert np.flatnonzero(chosen).tolist() == sorted(order[2:4].tolist())
    assert not filtered(f"{name}<1 & {name}>0.5", columns, labels, {}).any()
    empty = make_scatter(columns["lp"], np.full_like(values, np.nan), 0.1, log=False)
    assert (empty.top, len(empty.x)) == (0, 0)


def test_points_become_dots() -> None:
    dots, top = plots.braille_scatter(np.array([0.0, 1.0, 1.0]), np.array([1.0, 0.0, 0.01]), np.array([1, 0, 2]), 2, 2)
    assert chr(0x2800 + dots[0, 0]) == "⠁"
    assert chr(0x2800 + dots[1, 1]) == "⢀"
    assert top.tolist() == [[1, 0], [0, 2]]
    assert not dots[0, 1]


async def test_a_copied_card_says_what_it_is_about(tmp_path: Path) -> None:
    app = open_app(moe_atlas(tmp_path / "a.h5"))
    async with app.run_test(size=(80, 24)) as pilot:
        await press(pilot, "2", "j", "enter", "j", "enter")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        await press(pilot, "enter")
        await wait_until(lambda: isinstance(app.screen, CardScreen))
        await pilot.pause()
        await press(pilot, "y")
        await pilot.pause()
        assert app.clipboard.startswith("a.h5 ▸ layer 2 decoder.experts expert 1 ▸ channel ")
        assert "copied" in text_of(app)


@sizes
async def test_every_key_of_the_card(small: Path, size: tuple[int, int]) -> None:
    app = open_app(small)
    async with app.run_test(size=size) as pilot:
        layer = await in_layer(pilot, app, "j")
        await press(pilot, "enter")
        await wait_until(lambda: isinstance(app.screen, CardScreen))
        await pilot.pause()
        assert f"channel {layer.table.channel}   supernode" in text_of(app)
        keys = [("right_square_bracket", 1), ("l", 2), ("right", 3), ("h", 2), ("left", 1), ("left_square_bracket", 0)]
        for key, cursor in keys:
            await press(pilot, key)
            await pilot.pause()
            assert layer.table.cursor == cursor
            assert f"channel {layer.table.channel} " in text_of(app)
        await press(pilot, "space")
        await pilot.pause()
        assert "● protected" in text_of(app)
        await press(pilot, "u")
        await pilot.pause()
        assert app.session.marks.counts == [0, 0, 0, 0]
        assert "● protected" not in text_of(app)
        await press(pilot, "y")
        assert "lp_factored" in app.clipboard
        assert "splits; LP varies by" in app.clipboard
        await press(pilot, "j", "k", "down", "up", "question_mark", "q")
        await wait_until(lambda: isinstance(app.screen, CardScreen))
        for width, height in [(20, 5), (300, 80), (80, 24)]:
            await pilot.resize_terminal(width, height)
            assert [len(row) for row in text_of(app).splitlines()] == [width] * height
        await press(pilot, "q")
        await wait_until(lambda: app.screen is layer)


@sizes
async def test_every_key_of_the_scatter(small: Path, size: tuple[int, int]) -> None:
    app = open_app(small)
    async with app.run_test(size=size) as pilot:
        await in_layer(pilot, app, "j")
        await press(pilot, "x")
        await wait_until(lambda: isinstance(app.screen, ScatterScreen))
        await wait_until(lambda: "Spearman" in text_of(app))
        screen = app.screen
        assert isinstance(screen, ScatterScreen)
        variables = random_content().stacks[0].variables
        expected = stats.spearmanr(variables["lp"][1], variables["activation_power"][1]).statistic
        assert f"{expected:.3g}" in text_of(app)
        assert any("⠀" < char <= "⣿" for char in text_of(app))
        await press(pilot, "s")
        await pilot.pause()
        assert "activation_power against lp" in text_of(app)
        await press(pilot, "x")
        await wait_until(lambda: isinstance(app.screen, ChoiceScreen))
        await press(pilot, "G", "enter")
        await wait_until(lambda: app.screen is screen)
        await wait_until(lambda: "against read_connectivity" in text_of(app))
        await press(pilot, "m")
        await wait_until(lambda: isinstance(app.screen, ChoiceScreen))
        await press(pilot, "g", "j", "enter")
        await wait_until(lambda: "lp_factored against" in text_of(app))
        await press(pilot, "i")
        await pilot.pause()
        assert "96┤" in text_of(app)
        await press(pilot, "right_square_bracket", "l")
        await pilot.pause()
        assert "layer 3" in text_of(app)
        await press(pilot, "h", "left_square_bracket", "left", "right", "y")
        await pilot.pause()
        assert "layer 1" in text_of(app)
        assert app.clipboard.startswith("a.h5 ▸ layer 1   lp_factored against read_connectivity   Spearman")
        assert "copied" in text_of(app)
        await press(pilot, "question_mark", "escape")
        await wait_until(lambda: app.screen is screen)
        for width, height in [(20, 5), (300, 80), (80, 24)]:
            await pilot.resize_terminal(width, height)
            await pilot.pause()
            assert [len(row) for row in text_of(app).splitlines()] == [width] * height
        await press(pilot, "q")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))


async def test_without_colour_the_scatter_says_labels_in_letters(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    app = open_app(small)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(pilot, "enter", "x")
        await wait_until(lambda: isinstance(app.screen, ScatterScreen))
        await wait_until(lambda: "S supernode in the cell" in text_of(app))
        plot = [row for row in text_of(app).splitlines() if "┤" in row]
        assert any("S" in row.partition("┤")[2] for row in plot)


@pytest.mark.parametrize("name", ["no-redundancy", "stripped", "float-edges", "ungated-bias", "merged", "extension", "minimal"])
async def test_cards_and_scatters_of_the_conformance_files(name: str) -> None:
    app = open_app(VALID / f"{name}.h5")
    async with app.run_test(size=(110, 30)) as pilot:
        await press(pilot, "enter")
        await wait_until(lambda: isinstance(app.screen, LayerScreen))
        await press(pilot, "G", "enter")
        await wait_until(lambda: isinstance(app.screen, CardScreen))
        await pilot.pause()
        await press(pilot, "q", "x")
        await wait_until(lambda: isinstance(app.screen, ScatterScreen))
        await press(pilot, "i", "s")
        await pilot.pause()
        assert "Spearman" in text_of(app)


async def until_read(pilot: Pilot[None], app: AtlasApp) -> str:
    """The terminal once the tokenizer was looked for."""
    await wait_until(lambda: app.session.texts.state != READING)
    await pilot.pause()
    return text_of(app)


@sizes
async def test_driving_tokens_in_their_context(tmp_path: Path, size: tuple[int, int]) -> None:
    """With the model's tokenizer as text, whose control characters are visible; without it as ids."""
    content = random_content()
    ids = content.calibration.token_ids
    assert ids is not None
    words = {f" w{number}" if number % 2 else f"\x1b[{number}m\n": number for number in range(int(ids.max()) + 1)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=" w1"))
    tokenizer.decoder = Fuse()
    (tmp_path / "config.json").write_text("{}")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    shape = (*content.stacks[0].variables["lp"].shape, 3)
    value = np.full(shape, np.nan, dtype=np.float32)
    value[1, 5] = [-7.5, 2.25, 1.125]
    sequence, position = (np.full(shape, -1, dtype=np.int32) for _ in range(2))
    # A file may name a place that does not exist.
    sequence[1, 5], position[1, 5] = [1, 0, 99], [6, 0, 3]
    arrays = zip(ARRAY_BY_NAME, (value, sequence, position), strict=True)
    write_atlas(with_columns(content, {name: {"decoder": values} for name, values in arrays}), tmp_path / "a.h5")
    place = Place("card", layer=1, channel=5)
    token = int(ids[1, 6])
    for model, expected in ((str(tmp_path), visible(tokenizer.id_to_token(token))), (None, str(token))):
        app = AtlasApp(Session(read_snapshot(tmp_path / "a.h5"), place=place, model=model))
        async with app.run_test(size=size) as pilot:
            rows = [row for row in (await until_read(pilot, app)).split("\n") if "»" in row]
            assert [row.split()[0] for row in rows] == ["-7.500", "2.250", "1.125"]
            assert f"»{expected}«" in rows[0]
            assert "1:6" in rows[0]
            before = ids[1, :6].tolist()
            around = "".join(visible(tokenizer.id_to_token(item)) for item in before) if model else " ".join(map(str, before))
            assert around[-20:].strip() in rows[0]
            assert "»?«" in rows[2]
            assert (MISSING in text_of(app)) == (model is None)
