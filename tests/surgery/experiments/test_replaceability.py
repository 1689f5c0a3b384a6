"""Replaceability against least squares on the rows themselves, and what is stored of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from chanfmt.analysis.chance import turn_offset
from chanfmt.format.reader import Atlas
from surgery.cli.main import main
from surgery.experiments.regression import PENALTIES, Moments, explained
from surgery.experiments.replaceability import PARTS, ReplaceabilityOptions, replaceability
from tests.support.measured import SEQ_LEN, Tiny, make_tiny

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("llama"), "llama")


def moments(u: np.ndarray, y: np.ndarray) -> Moments:
    return Moments(len(u), u.sum(0), u.T @ u, y.sum(0), (y**2).sum(0), u.T @ y)


def r2_by_rows(rows: list[np.ndarray], targets: list[np.ndarray], own: int, peers: int | None) -> float:
    """R^2 of one target, from numpy's least squares on standardised rows; ``rows`` and ``targets`` are fit, choose, judge."""

    def predicted(u: np.ndarray, y: np.ndarray, at: np.ndarray, penalty: float) -> np.ndarray:
        mean, deviation = u.mean(0), u.std(0)
        alive = [i for i in range(u.shape[1]) if i != own and deviation[i] > 1e-9]
        scaled, wanted = (u - mean) / np.where(deviation > 1e-9, deviation, 1), (y - y.mean()) / y.std()
        size = np.abs(scaled.T @ wanted)
        if peers is not None:
            alive = sorted(alive, key=lambda i: -size[i])[:peers]
        stacked = np.concatenate([scaled[:, alive], np.sqrt(penalty * len(u)) * np.eye(len(alive))])
        weights = np.linalg.lstsq(stacked, np.append(wanted, np.zeros(len(alive))), rcond=None)[0]
        return y.mean() + y.std() * (((at - mean) / np.where(deviation > 1e-9, deviation, 1))[:, alive] @ weights)

    errors = [np.sum((targets[1] - predicted(rows[0], targets[0], rows[1], penalty)) ** 2) for penalty in PENALTIES]
    u, y = np.concatenate(rows[:2]), np.concatenate(targets[:2])
    found = predicted(u, y, rows[2], PENALTIES[int(np.argmin(errors))])
    return 1 - np.sum((targets[2] - found) ** 2) / np.sum((targets[2] - y.mean()) ** 2)


@pytest.mark.parametrize("tokens", [300, 12])
@pytest.mark.parametrize("peers", [None, 3])
def test_equals_least_squares_on_the_rows(tokens: int, peers: int | None) -> None:
    """With more tokens than channels, and with fewer; scales differ by ten decades; one channel is dead, one a copy."""
    random = np.random.default_rng(tokens)
    u = random.normal(size=(3 * tokens, 20)) @ random.normal(size=(20, 20)) * np.logspace(-5, 5, 20) + np.logspace(-5, 5, 20)
    u[:, 4] = 0.25
    u[:, 6] = -3 * u[:, 5]
    own = np.arange(20)
    rows = np.split(u, 3)
    found = explained(*(moments(part, part) for part in rows), own, peers)
    assert np.flatnonzero(np.isnan(found)).tolist() == [4]
    for channel in np.setdiff1d(own, [4]):
        expected = r2_by_rows(rows, [part[:, channel] for part in rows], channel, peers)
        assert found[channel] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert min(found[5], found[6]) > 0.99
    other = random.permutation(u, axis=0)
    targets = np.split(other[:, [2, 9]], 3)
    found = explained(*(moments(part, target) for part, target in zip(rows, targets, strict=True)), np.array([2, 9]), peers)
    for place, channel in enumerate((2, 9)):
        expected = r2_by_rows(rows, [target[:, place] for target in targets], channel, peers)
        assert found[place] == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert found[place] < 0.3


def test_a_model_by_hand(llama: Tiny, tmp_path: Path) -> None:
    """Every channel of one layer, and supernodes of the other, from activations that hooks saw."""
    import torch

    atlas, subject = llama.subject(max_tokens=9 * SEQ_LEN + 7)
    options = ReplaceabilityOptions(("top:lp=100%@1", "supernodes@0"), skip_first=2)
    found = replaceability(atlas, subject, options=options, store=tmp_path / "a.h5")
    seen = []
    handle = subject.model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for block in torch.from_numpy(subject.token_ids[: 9 * SEQ_LEN]).long().view(9, SEQ_LEN):
            subject.model(block[None])
    handle.remove()
    u = torch.cat(seen)[:, 2:].numpy()
    assert u.shape[:2] == (9, SEQ_LEN - 2)

    def parts(values: np.ndarray) -> list[np.ndarray]:
        chosen = ([0, 1], [2], [3])
        return [np.concatenate([row for number, row in enumerate(values) if number % PARTS in part]) for part in chosen]

    # All nine blocks are one batch; each target comes from the block before, the first from the last.
    turned = np.stack([np.roll(u[number - 1], turn_offset(number, SEQ_LEN - 2, 1), 0) for number in range(9)])
    for channel in (0, 17, 43):
        for values, rows in ((found.values, u), (found.null, turned)):
            expected = r2_by_rows(parts(u), [part[:, channel] for part in parts(rows)], channel, None)
            assert values[1][channel] == pytest.approx(expected, rel=1e-6, abs=1e-8)
    core = atlas.stacks["decoder"]["label"][0] == 2
    assert np.array_equal(np.isfinite(found.values[0]), core)
    with Atlas.open(tmp_path / "a.h5", verify=True) as stored:
        for name, values in (("replaceability", found.values), ("replaceability_null", found.null)):
            column = stored.stacks["decoder"][f"x_common/{name}"]
            np.testing.assert_array_equal(column, np.stack([values[0], values[1]]).astype(np.float32))
        assert stored.producer.history[-1]["command"] == "replaceability"
    assert {(row["layer"], row["label"]) for row in found.rows} == {(0, "supernode"), (1, "none"), (1, "halo"), (1, "supernode")}


def test_on_the_command_line(llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["replaceability", str(llama.atlas), "--model", str(llama.model), "--data", str(llama.text), "--seq-len", "32"]
    stored = tmp_path / "a.h5"
    more = ["--max-tokens", "256", "--peers", "5", "--quiet"]
    assert main([*words, *more, "--layers", "0", "--store", str(stored), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["label"] for row in rows] == ["supernode", "halo"]
    words[1] = str(stored)
    # The same channels are not measured again unasked; those of the other layer are added.
    assert main([*words, *more, "--store", str(stored)]) == 2
    assert "of layer 0 already" in capsys.readouterr().err
    assert main([*words, *more, "--layers", "1", "--store", str(stored)]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == [
        "layer",
        "stack",
        "label",
        "channels",
        "R^2",
        "smallest",
        "largest",
        "null",
    ]
    with Atlas.open(stored, verify=True) as atlas:
        known = np.isfinite(atlas.stacks["decoder"]["x_common/replaceability"])
        assert np.array_equal(known, atlas.stacks["decoder"]["label"] > 0)
    for wrong, reason in (
        (["--peers", "none"], "all or a number of peers"),
        (["--max-tokens", "64"], "has 2 whole blocks of 32 tokens"),
        (["--skip-first", "31"], "fewer than two tokens"),
        (["--select", "none"], "no channel is selected"),
    ):
        assert main([*words, *more, *wrong]) == 2
        assert reason in capsys.readouterr().err
