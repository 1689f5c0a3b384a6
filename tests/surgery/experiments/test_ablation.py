"""Ablations: the removed channels, matched controls, and losses equal to those of a model without these channels."""

from __future__ import annotations

import csv
import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional

import surgery
from chanfmt.algebra.validate import validate
from chanfmt.analysis.controls import matched_control, random_control
from chanfmt.base.errors import UsageError
from chanfmt.cli.main import main as chanfmt_main
from chanfmt.format import schema
from chanfmt.format.reader import Atlas
from chanfmt.models.run import run_text
from surgery.cli.main import main
from surgery.experiments.ablation.channels import ChannelOptions, plan_channels
from surgery.experiments.ablation.dose import DoseOptions, plan_dose
from surgery.experiments.ablation.experiment import masses
from surgery.experiments.ablation.halo import HaloOptions, plan_halo
from surgery.experiments.ablation.removal import RemovalOptions, mean_activations, plan_removal
from surgery.experiments.ablation.run import ablate, run
from surgery.experiments.ablation.weights import WeightOptions, plan_weights
from surgery.experiments.replaceability import ReplaceabilityOptions, replaceability
from surgery.planning.methods import score
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from surgery.planning.selectors import select
from tests.support.factory import moe_atlas, random_atlas
from tests.support.measured import SEQ_LEN, TOKENS, Forwards, Tiny, make_tiny

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from surgery.experiments.ablation.experiment import Condition, Experiment
    from surgery.experiments.subject import Subject


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return Atlas.open(random_atlas(tmp_path_factory.mktemp("atlas") / "a.h5", layers=4, channels=430))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    """Layer 0 is dense, layers 1 to 3 have four experts of 24 channels; no token reached expert 1 of layer 1."""
    return Atlas.open(moe_atlas(tmp_path_factory.mktemp("atlas") / "e.h5"))


def units(atlas: Atlas, masks: Mapping[int, np.ndarray]) -> dict[tuple[int, int], set[int]]:
    """Channels that ``masks`` mark in every FFN, or in every expert of it."""
    return {
        (index, number): set(np.flatnonzero(row).tolist())
        for index, mask in masks.items()
        for number, row in enumerate(np.atleast_2d(mask))
    }


def core(atlas: Atlas, label: int = schema.LABEL_SUPERNODE) -> dict[tuple[int, int], set[int]]:
    return units(atlas, {block.index: stack.row("label", block.row) == label for block, stack in atlas.rows()})


def by_key(experiment: Experiment) -> dict[tuple[Any, ...], Condition]:
    found = {tuple(condition.key.values()): condition for condition in experiment.conditions}
    assert len(found) == len(experiment.conditions)
    return found


@torch.no_grad()
def nll_by_hand(subject: Subject) -> float:
    """Mean next-token NLL, from the logits of the model as it is now."""
    total, count = 0.0, 0
    for block in torch.from_numpy(subject.token_ids).long().split(SEQ_LEN):
        logits = run_text(subject.model, block[None]).logits[0, :-1]
        total += float(functional.cross_entropy(logits, block[1:], reduction="sum"))
        count += len(block) - 1
    return total / count


# Controls


@pytest.mark.parametrize("shape", [(200,), (3, 60)])
def test_matched_controls_are_the_nearest_left(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    lp = np.exp(random.normal(0, 2, shape))
    selected = random.random(shape) < 0.2
    pool = ~selected & (random.random(shape) < 0.7)
    control = matched_control(selected, pool, lp)
    assert not (control & ~pool).any()
    assert (control.sum(axis=-1) == selected.sum(axis=-1)).all()
    for row, chosen, free, drawn in zip(*map(np.atleast_2d, (lp, selected, pool, control)), strict=True):
        left, expected = set(np.flatnonzero(free)), set()
        for value in sorted(np.log(row[chosen]), reverse=True):
            nearest = min(left, key=lambda channel: abs(np.log(row[channel]) - value))
            left.remove(nearest)
            expected.add(nearest)
        assert set(np.flatnonzero(drawn)) == expected
    assert lp[control].sum() == pytest.approx(lp[selected].sum(), rel=0.25)


def test_matched_controls_take_ties_and_nothing_of_nothing() -> None:
    lp = np.array([0.0, 0.0, 1.0, 1.0, 1.0])
    selected = np.array([True, False, True, False, False])
    assert matched_control(selected, ~selected, lp).sum() == 2
    assert matched_control(selected, ~selected, lp)[1]
    assert not matched_control(np.zeros(5, dtype=bool), ~selected, lp).any()


def test_random_controls_are_drawn_from_the_pool() -> None:
    selected = np.zeros((2, 50), dtype=bool)
    selected[0, :10], selected[1, :3] = True, True
    pool = ~selected
    pool[:, 40:] = False
    drawn = [random_control(selected, pool, np.random.default_rng(seed)) for seed in range(200)]
    assert all((mask.sum(axis=1) == [10, 3]).all() and not (mask & ~pool).any() for mask in drawn)
    often = np.sum(drawn, axis=0)
    assert (often[0, 10:40] > 0.5 * 200 / 3).all()
    assert (often[1, 3:40] > 0).all()
    for make in (
        lambda: random_control(pool, selected, np.random.default_rng(0)),
        lambda: matched_control(pool, selected, np.ones(pool.shape)),
    ):
        with pytest.raises(UsageError, match="30 channels has no control of its size: 10 others are left"):
            make()


# What goes


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_removal_and_its_controls(name: str, request: pytest.FixtureRequest) -> None:
    atlas: Atlas = request.getfixturevalue(name)
    options = RemovalOptions(("halo", "supernodes"), "random,lp-matched", "0,5")
    found = by_key(plan_removal(atlas, options, mean=False))
    for selector, label in (("halo", schema.LABEL_HALO), ("supernodes", schema.LABEL_SUPERNODE)):
        wanted = core(atlas, label)
        assert units(atlas, found["all", selector, None, None].removed) == wanted
        drawn = []
        for control, seed in (("random", 0), ("random", 5), ("lp-matched", None)):
            other = units(atlas, found["all", selector, control, seed].removed)
            drawn.append(other)
            assert other.keys() == wanted.keys()
            for unit, channels in other.items():
                assert len(channels) == len(wanted[unit])
                assert not channels & (wanted[unit] | core(atlas)[unit])
        assert drawn[0] != drawn[1] != drawn[2]
    assert len(found) == 8


def test_matched_controls_of_a_halo_hold_its_lp(dense: Atlas) -> None:
    experiment = plan_removal(dense, RemovalOptions(("halo", "supernodes"), "random,lp-matched"), mean=False)
    found, lp = by_key(experiment), masses(dense)

    def held(*key: Any) -> float:
        return sum(lp[index][mask].sum() for index, mask in found[("all", *key)].removed.items())

    assert held("halo", "lp-matched", None) == pytest.approx(held("halo", None, None), rel=0.1)
    # No other channels are as large as supernodes, and a warning says so.
    assert held("supernodes", "lp-matched", None) < 0.8 * held("supernodes", None, None)
    assert [warning.split(":")[0] for warning in experiment.warnings] == ["supernodes"]


def test_one_layer_at_a_time(experts: Atlas) -> None:
    options = RemovalOptions(("supernodes@1-3", "top:lp=2"), "random", "3", "0,2", one_layer_at_a_time=True)
    found = by_key(plan_removal(experts, options, mean=False))
    assert {key[:2] for key in found} == {("2", "supernodes@1-3"), ("0", "top:lp=2"), ("2", "top:lp=2")}
    assert {index for index, _ in units(experts, found["2", "top:lp=2", None, None].removed)} == {2}
    whole = by_key(plan_removal(experts, RemovalOptions(("top:lp=2",), "none", layers="0,2"), mean=False))
    assert list(whole) == [("0,2", "top:lp=2", None, None)]
    assert set(whole["0,2", "top:lp=2", None, None].removed) == {0, 2}
    assert all(len(channels) == 2 for channels in units(experts, whole["0,2", "top:lp=2", None, None].removed).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (RemovalOptions(control="lucky"), "unknown control 'lucky'; choose from random, lp-matched, none"),
        (RemovalOptions(layers="9"), "--layers: there is no layer 9"),
        (RemovalOptions(("supernodes@1",), layers="2"), "selects no channel of the ablated layers"),
        (RemovalOptions(("top:lp=60%",)), "no control of its size"),
        (RemovalOptions(("superb",)), "unknown selector"),
    ],
)
def test_removals_that_cannot_be(dense: Atlas, options: RemovalOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_removal(dense, options, mean=False)


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_halo_with_supernodes_kept_and_removed(name: str, request: pytest.FixtureRequest) -> None:
    atlas: Atlas = request.getfixturevalue(name)
    experiment = plan_halo(atlas, HaloOptions("0,1"))
    found, nodes, halo = by_key(experiment), core(atlas), core(atlas, schema.LABEL_HALO)
    alone = found["all", "removed", "nothing", None]
    assert units(atlas, alone.removed) == nodes
    assert len(found) == 9
    for what, seed in (("halo", None), ("lp-matched", None), ("random", 0), ("random", 1)):
        kept, gone = found["all", "kept", what, seed], found["all", "removed", what, seed]
        assert kept.reference is None
        assert gone.reference is alone
        channels = units(atlas, kept.removed)
        assert units(atlas, gone.removed) == {unit: channels[unit] | nodes[unit] for unit in nodes}
        for unit, ids in channels.items():
            assert len(ids) == len(halo[unit])
            assert not ids & nodes[unit]
            assert ids == halo[unit] if what == "halo" else not ids & halo[unit]
    order = [tuple(condition.key.values()) for condition in experiment.conditions]
    assert order.index(("all", "removed", "nothing", None)) < order.index(("all", "removed", "halo", None))


@pytest.mark.parametrize("name", ["dense", "experts"])
@pytest.mark.parametrize("method", ["scar-lp", "wanda", "random"])
def test_doses_are_of_one_size(name: str, method: str, request: pytest.FixtureRequest) -> None:
    atlas: Atlas = request.getfixturevalue(name)
    found = by_key(plan_dose(atlas, DoseOptions(0.4, "0:1:0.25", method, "0,3")))
    assert list(found) == [(dose, seed) for seed in (0, 3) for dose in (0.0, 0.25, 0.5, 0.75, 1.0)]
    nodes = core(atlas)
    plan = make_plan(atlas, PlanOptions(0.4, method))
    for seed in (0, 3):
        before: dict[tuple[int, int], set[int]] = {unit: set() for unit in nodes}
        for dose in (0.0, 0.25, 0.5, 0.75, 1.0):
            for unit, channels in units(atlas, found[dose, seed].removed).items():
                index, number = unit
                block = atlas.blocks[index]
                assert len(channels) == len(plan.blocks[index].removed_of(number))
                gone = channels & nodes[unit]
                assert len(gone) == int(dose * len(nodes[unit]) + 0.5)
                assert before[unit] <= gone
                before[unit] = gone
                values = np.atleast_2d(score(method, atlas, block, seed))[number]
                rest = sorted(set(range(len(values))) - nodes[unit], key=lambda channel: (values[channel], -channel))
                assert channels - nodes[unit] == set(rest[: len(channels) - len(gone)])
    if name == "dense":
        first, second = (units(atlas, found[0.25, seed].removed)[0, 0] & nodes[0, 0] for seed in (0, 3))
        assert first != second


def test_no_dose_is_a_cut_by_the_same_method(dense: Atlas) -> None:
    (condition,) = plan_dose(dense, DoseOptions(0.5, "0")).conditions
    plan = make_plan(dense, PlanOptions(0.5, "scar-lp"))
    assert [np.flatnonzero(mask).tolist() for mask in condition.removed.values()] == [
        block.removed_of(0).tolist() for block in plan.blocks
    ]


def test_doses_need_room(dense: Atlas, experts: Atlas) -> None:
    with pytest.raises(UsageError, match="layer 0 has 4 supernodes and removes 2 channels"):
        plan_dose(dense, DoseOptions(0.005, multiple_of=1))
    with pytest.raises(UsageError, match="layer 0 has 4 supernodes and keeps 2 channels"):
        plan_dose(dense, DoseOptions(0.9955, multiple_of=1))
    with pytest.raises(UsageError, match="--sparsity"):
        plan_dose(dense, DoseOptions(1.5))


def test_channels_span_the_range_of_lp(dense: Atlas, experts: Atlas) -> None:
    experiment = plan_channels(dense, ChannelOptions(5))
    assert [condition.key["layers"] for condition in experiment.conditions] == ["0"] * 5 + ["2"] * 5 + ["3"] * 5
    for condition in experiment.conditions:
        lp = dense.stacks["decoder"]["lp"][int(condition.key["layers"])].astype(np.float64)
        channel = condition.key["channel"]
        assert units(dense, condition.removed) == {(int(condition.key["layers"]), 0): {channel}}
        assert condition.extra["lp"] == pytest.approx(lp[channel])
        assert condition.extra["rank"] == 1 + np.count_nonzero(lp > lp[channel])
    assert [condition.extra["rank"] for condition in experiment.conditions[:5]] == [1, 108, 215, 323, 430]
    experiment = plan_channels(experts, ChannelOptions(24, "1"))
    tokens = experts.stacks["decoder.experts"]["tokens"][0]
    assert {condition.key["expert"] for condition in experiment.conditions} == {int(np.argmax(tokens))}
    assert len(experiment.conditions) == 24
    first = experiment.conditions[0]
    lp = experts.stacks["decoder.experts"]["lp"][0, int(np.argmax(tokens))]
    assert first.extra["lp"] == pytest.approx(float(lp.max()) * tokens.max() / 512)
    assert first.removed[1].shape == (4, 24)
    assert first.removed[1].sum() == 1
    with pytest.raises(UsageError, match="--channels must be at least 2"):
        plan_channels(dense, ChannelOptions(1))


# What it costs


def test_rows_are_losses_without_the_channels(llama: Tiny, tmp_path: Path) -> None:
    atlas, subject = llama.subject()
    experiment = plan_halo(atlas, HaloOptions(layers="1"))
    rows = run(atlas, subject, experiment, tmp_path / "out").rows
    lp = masses(atlas)
    found = {tuple(row[name] for name in experiment.key): row for row in rows}
    assert len(found) == len(rows) == 8
    base = found[None, None, None, None]
    assert base["nll"] == pytest.approx(nll_by_hand(subject), rel=1e-9)
    assert (base["channels"], base["delta_nll"]) == (0, 0.0)
    weight = subject.model.model.layers[1].mlp.down_proj.weight
    for condition in experiment.conditions:
        row = found[tuple(condition.key.values())]
        mask = condition.removed[1]
        whole = weight.detach().clone()
        with torch.no_grad():
            weight[:, torch.from_numpy(mask)] = 0.0
        assert row["nll"] == pytest.approx(nll_by_hand(subject), rel=1e-9)
        with torch.no_grad():
            weight.copy_(whole)
        reference = base if condition.key["supernodes"] == "kept" else found["1", "removed", "nothing", None]
        reference = base if condition.key["removed"] == "nothing" else reference
        assert row["delta_nll"] == pytest.approx(row["nll"] - reference["nll"], abs=1e-12)
        gaps = np.array(row["block_nll"]) - np.array(reference["block_nll"])
        counts = np.array(row["block_predicted"])
        spread = gaps - counts * gaps.sum() / counts.sum()
        assert row["delta_standard_error"] == pytest.approx(np.sqrt(5 / 4 * (spread**2).sum()) / counts.sum())
        assert row["channels"] == mask.sum()
        assert row["supernodes_removed"] == (4 if condition.key["supernodes"] == "removed" else 0)
        assert row["lp_removed"] == pytest.approx(lp[1][mask].sum())
    assert len({row["nll"] for row in rows}) == 8


@pytest.mark.parametrize("selector", ["supernodes", "top:lp=30"])
def test_mean_replacement_by_hand(llama: Tiny, tmp_path: Path, selector: str) -> None:
    atlas, subject = llama.subject()
    options = RemovalOptions((selector,), "none")
    rows = run(atlas, subject, plan_removal(atlas, options, mean=True), tmp_path / "mean").rows
    zeroed = run(atlas, subject, plan_removal(atlas, options, mean=False), tmp_path / "zero").rows
    stack = atlas.stacks["decoder"]
    count = 4 if selector == "supernodes" else 30
    for layer, module in enumerate(subject.model.model.layers):
        chosen = torch.from_numpy(np.argsort(-stack["lp"][layer], kind="stable")[:count].copy())
        means = torch.from_numpy(stack["sum_u"][layer] / (16 * 64))[chosen]

        def replaced(module: Any, inputs: Any, chosen: torch.Tensor = chosen, means: torch.Tensor = means) -> torch.Tensor:
            u = inputs[0].clone()
            u[..., chosen] = means
            return u

        module.mlp.down_proj.register_forward_pre_hook(replaced)
    assert rows[1]["nll"] == pytest.approx(nll_by_hand(subject), rel=1e-9)
    assert abs(rows[1]["nll"] - zeroed[1]["nll"]) > 1e-6
    assert rows[0]["nll"] == zeroed[0]["nll"]


def test_means_of_experts_are_over_their_own_tokens(experts: Atlas) -> None:
    means = mean_activations(experts)
    stack = experts.stacks["decoder.experts"]
    assert means[1].shape == (4, 24)
    assert (means[1][1] == 0).all()
    np.testing.assert_allclose(means[2][3], stack["sum_u"][1, 3] / stack["tokens"][1, 3])


def test_experts_are_ablated(mixtral: Tiny, tmp_path: Path) -> None:
    atlas, subject = mixtral.subject()
    experiment = plan_removal(atlas, RemovalOptions(("1/2:0-19",), "random"), mean=False)
    rows = run(atlas, subject, experiment, tmp_path / "out").rows
    assert [row["channels"] for row in rows] == [0, 20, 20]
    with torch.no_grad():
        subject.model.model.layers[1].mlp.experts.down_proj[2][:, :20] = 0.0
    assert rows[1]["nll"] == pytest.approx(nll_by_hand(subject), rel=1e-9)
    assert rows[1]["nll"] != rows[0]["nll"]


def test_single_channels_against_lp(llama: Tiny, tmp_path: Path) -> None:
    atlas, subject = llama.subject()
    experiment = plan_channels(atlas, ChannelOptions(6))
    found = run(atlas, subject, experiment, tmp_path / "out")
    rows, summary = found.rows, found.summary
    assert len(rows) == 13
    row = rows[4]
    weight = subject.model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight[:, row["channel"]] = 0.0
    assert row["delta_nll"] == pytest.approx(nll_by_hand(subject) - rows[0]["nll"], abs=1e-9)
    assert row["ratio"] == pytest.approx(row["delta_nll"] / row["lp"])
    assert row["chance"] == pytest.approx(np.sqrt(2 * row["lp"] / (TOKENS - 5)))
    assert [line["module"] for line in summary] == ["model.layers.0.mlp", "model.layers.1.mlp", "all"]
    lp, delta = (np.array([row[name] for row in rows[1:]]) for name in ("lp", "delta_nll"))
    assert summary[2]["spearman"] == pytest.approx(spearmanr(lp, delta).statistic)
    assert summary[2]["spearman_of_size"] == pytest.approx(spearmanr(lp, np.abs(delta)).statistic)
    assert summary[2]["ratio_of_sums"] == pytest.approx(delta.sum() / lp.sum())
    # Even with random weights, the size of a channel's cost correlates with its LP.
    assert summary[2]["spearman_of_size"] > 0.5


def test_channels_below_chance_say_nothing_of_the_ratio(dense: Atlas) -> None:
    experiment = plan_channels(dense, ChannelOptions(4, "0"))
    rows = []
    for lp, delta in ((0.5, 1.0), (0.2, 0.6), (0.01, 0.001), (0.0, -0.1)):
        row = {"module": "m", "lp": lp, "delta_nll": delta, "tokens": 100}
        rows.append(row | experiment.conclude(row))
    assert [row["ratio"] for row in rows] == [pytest.approx(2), pytest.approx(3), pytest.approx(0.1), None]
    assert rows[1]["chance"] == pytest.approx(np.sqrt(2 * 0.2 / 100))
    assert experiment.summarise is not None
    (line,) = experiment.summarise(rows)
    assert (line["channels"], line["resolved"], line["spearman"]) == (4, 2, pytest.approx(1))
    assert line["spearman_of_size"] == pytest.approx(0.8)
    assert line["median_ratio_of_resolved"] == pytest.approx(2.5)
    assert line["ratio_of_sums"] == pytest.approx(1.501 / 0.71)


@pytest.mark.parametrize(
    ("name", "more", "rows"),
    [
        ("remove", ["--control", "random,lp-matched", "--seeds", "0,1"], 9),
        ("remove", ["--select", "supernodes", "--one-layer-at-a-time"], 5),
        ("mean-replace", ["--select", "halo", "--layers", "1"], 3),
        ("halo", [], 8),
        ("dose", ["--doses", "0,0.5,1", "--seeds", "0-1"], 7),
        ("channels", ["--channels", "4"], 9),
        ("weights", ["--weight", "1:3:7", "--controls", "2"], 5),
    ],
)
def test_every_experiment_on_the_command_line(
    llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, more: list[str], rows: int
) -> None:
    assert main(["ablate", name, *llama.arguments(tmp_path / "out", *more)]) == 0
    shown = capsys.readouterr().out
    first, second = shown.split("\n\n")
    assert len(first.splitlines()) == rows + 1
    assert first.splitlines()[1].split()[0] == "dense"
    assert len(second.splitlines()) >= 2
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["identity"]["experiment"] == name
    assert stored["summary"]
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(stored["rows"]) == rows
    assert [float(line["delta_nll"]) for line in table] == [row["delta_nll"] for row in stored["rows"]]
    before = (tmp_path / "out" / "results.csv").read_bytes()
    assert main(["ablate", name, *llama.arguments(tmp_path / "out", *more, "--json")]) == 0
    # The column of seconds is equal too, so nothing was measured again.
    assert (tmp_path / "out" / "results.csv").read_bytes() == before
    assert json.loads(capsys.readouterr().out)["rows"] == stored["rows"]


def test_ablations_go_on_where_they_stopped(llama: Tiny, tmp_path: Path) -> None:
    atlas, subject = llama.subject()
    experiment = plan_dose(atlas, DoseOptions(0.5, "0,0.5,1"))
    forwards = Forwards(subject)
    found = run(atlas, subject, experiment, tmp_path / "whole")
    whole, summary = found.rows, found.summary
    again = run(atlas, subject, experiment, tmp_path / "whole").rows
    assert again == whole
    each = forwards.count // 4
    atlas, subject = llama.subject()
    Forwards(subject, stop_at=2 * each + 2)
    with pytest.raises(KeyboardInterrupt, match="2 finished rows are in"):
        run(atlas, subject, experiment, tmp_path / "out")
    atlas, subject = llama.subject()
    forwards = Forwards(subject)
    found = run(atlas, subject, experiment, tmp_path / "out")
    rest, concluded = found.rows, found.summary
    assert forwards.count == 2 * each
    assert concluded == summary
    assert [row["nll"] for row in rest] == [row["nll"] for row in whole]
    assert [row["supernodes_removed"] for row in rest] == [0, 0, 4, 8]
    assert {row["channels"] for row in rest[1:]} == {2 * (44 - 24)}


def test_other_experiments_are_refused(llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert main(["ablate", "remove", *llama.arguments(output, "--select", "halo")]) == 0
    assert main(["ablate", "mean-replace", *llama.arguments(output, "--select", "halo")]) == 2
    assert "was measured with another experiment" in capsys.readouterr().err
    assert main(["ablate", "remove", *llama.arguments(output, "--select", "halo", "--layers", "0")]) == 2
    assert "another layers" in capsys.readouterr().err
    assert main(["ablate", "remove", *llama.arguments(output, "--select", "halo", "--layers", "0", "--overwrite")]) == 0
    assert main(["ablate", "removes"]) == 2
    assert main(["ablate", "remove", *llama.arguments(output, "--seeds", "one")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_tokens_are_those_of_the_text(llama: Tiny) -> None:
    _, subject = llama.subject()
    assert len(subject.token_ids) == TOKENS
    assert subject.identity["dtype"] == "float64"


# Losses in an atlas


def test_measured_losses_are_stored_with_their_errors(llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs add up, in a copy of the atlas that is replaced; nothing is measured again or replaced unasked."""
    stored = tmp_path / "measured.h5"
    first = llama.arguments(tmp_path / "a", "--select", "supernodes@1", "--select", "0:3,7", "--store", str(stored))
    before = llama.atlas.read_bytes()
    assert main(["ablate", "channels", *first]) == 0
    assert llama.atlas.read_bytes() == before
    rows = json.loads((tmp_path / "a" / "results.json").read_text())["rows"][1:]
    with Atlas.open(stored, verify=True) as atlas:
        loss, error = (atlas.stacks["decoder"][f"x_common/ablation_loss{end}"] for end in ("", "_error"))
        assert loss.dtype == np.float32
        assert np.isfinite(loss).sum() == len(rows) == 6
        for row in rows:
            at = int(row["layers"]), row["channel"]
            assert loss[at] == np.float32(row["delta_nll"])
            assert error[at] == np.float32(row["delta_standard_error"])
        assert {(int(row["layers"]), row["channel"]) for row in rows} >= {(0, 3), (0, 7)}
        [about] = [item for item in atlas.stacks["decoder"].extension_metrics if item.name == "x_common/ablation_loss"]
        assert "200 tokens in blocks of 48" in about.long_name
        assert atlas.producer.history[-1]["tokens"] == 200
        masks, _ = select("above:x_common/ablation_loss=-1e9", atlas)
        assert [np.flatnonzero(masks[0]).tolist(), int(masks[1].sum())] == [[3, 7], 4]
    assert not [item for item in validate(stored) if item.code.startswith("E")]
    capsys.readouterr()
    assert chanfmt_main(["show", str(stored), "--layer", "0", "--channel", "3"]) == 0
    shown = capsys.readouterr().out
    assert "x_common/ablation_loss_error: measured on " in shown
    # Another file is not replaced; a channel that has a loss is not measured again.
    assert main(["ablate", "channels", *llama.arguments(tmp_path / "b", "--select", "0:5", "--store", str(stored))]) == 2
    assert "is not the atlas that was given" in capsys.readouterr().err
    # Rows of the atlas before its own numbers were in it are rows of the same atlas, so both runs share a directory.
    more = [str(stored), *llama.arguments(tmp_path / "a", "--store", str(stored))[1:]]
    assert main(["ablate", "channels", *more, "--select", "0:3"]) == 2
    assert "x_common/ablation_loss of channel 3 of layer 0 already" in capsys.readouterr().err
    assert main(["ablate", "channels", *more, "--select", "0:5", "--max-tokens", "150"]) == 2
    assert "measured differently" in capsys.readouterr().err
    with Atlas.open(stored) as atlas:
        assert np.array_equal(atlas.stacks["decoder"]["x_common/ablation_loss"], loss, equal_nan=True)
    assert main(["ablate", "channels", *more, "--select", "0:5"]) == 0
    assert len(json.loads((tmp_path / "a" / "results.json").read_text())["rows"][1:]) == 7
    with Atlas.open(stored, verify=True) as atlas:
        found = atlas.stacks["decoder"]["x_common/ablation_loss"]
        assert np.isfinite(found).sum() == 7
        assert np.array_equal(found[np.isfinite(loss)], loss[np.isfinite(loss)])
    assert (
        main(
            ["ablate", "channels", *more[:-1], str(stored), "--select", "0:5", "--max-tokens", "150", "--replace", "--overwrite"]
        )
        == 0
    )
    with Atlas.open(stored, verify=True) as atlas:
        assert np.argwhere(np.isfinite(atlas.stacks["decoder"]["x_common/ablation_loss"])).tolist() == [[0, 5]]


def test_losses_of_experts_and_of_means_are_stored(mixtral: Tiny, tmp_path: Path) -> None:
    stored = tmp_path / "measured.h5"
    found = surgery.ablate(
        mixtral.atlas,
        "channels",
        str(mixtral.model),
        str(mixtral.text),
        seq_len=SEQ_LEN,
        max_tokens=TOKENS,
        dtype="float64",
        select=["1/2:0-3"],
        mean=True,
        store=stored,
    )
    with Atlas.open(stored, verify=True) as atlas:
        [(_, stack)] = [(block, stack) for block, stack in atlas.rows() if block.layer_index == 1 and block.n_experts]
        loss = stack["x_common/mean_ablation_loss"]
        assert "x_common/ablation_loss" not in stack
    known = np.argwhere(np.isfinite(loss))
    assert known[:, 1:].tolist() == [[2, 0], [2, 1], [2, 2], [2, 3]]
    by_channel = {row["channel"]: row["delta_nll"] for row in found.rows[1:]}
    assert loss[tuple(known[1])] == np.float32(by_channel[1])


def test_an_atlas_that_changed_since_it_was_opened_keeps_what_it_got(llama: Tiny, tmp_path: Path) -> None:
    """The open atlas does not see what a first run wrote, and a second run would leave it out."""
    file = tmp_path / "a.h5"
    file.write_bytes(llama.atlas.read_bytes())
    words = {"seq_len": SEQ_LEN, "max_tokens": TOKENS, "dtype": "float64", "store": file}
    with Atlas.open(file) as atlas:
        surgery.ablate(atlas, "channels", str(llama.model), str(llama.text), select=["0:3"], **words)
        after = file.read_bytes()
        with pytest.raises(UsageError, match="has changed since it was opened"):
            surgery.ablate(atlas, "channels", str(llama.model), str(llama.text), select=["0:7"], **words)
    assert file.read_bytes() == after != llama.atlas.read_bytes()


def test_only_losses_of_single_channels_of_a_checkpoint_are_stored(llama: Tiny, tmp_path: Path) -> None:
    atlas, subject = llama.subject()
    with pytest.raises(UsageError, match="removes several channels at once"):
        ablate(atlas, "remove", subject, store=tmp_path / "a.h5", select=["supernodes"])
    loaded = dataclasses.replace(subject, source=None)
    with pytest.raises(UsageError, match="in memory cannot be stored"):
        ablate(atlas, "channels", loaded, store=tmp_path / "a.h5", channels=2, layers="0")
    assert not (tmp_path / "a.h5").exists()


@pytest.mark.parametrize(("name", "key", "expert"), [("llama", "1", None), ("mixtral", "1/2", 2)])
def test_one_weight_is_set_to_zero(name: str, key: str, expert: int | None, request: pytest.FixtureRequest) -> None:
    """The weight, the row behind the last one, and the channel, against a model that was changed by hand; then it is whole again."""
    atlas, subject = request.getfixturevalue(name).subject()
    mlp = subject.model.model.layers[1].mlp
    matrix = mlp.down_proj.weight if expert is None else mlp.experts.down_proj[expert]
    last = len(matrix) - 1
    before = matrix.detach().clone()
    rows = run(atlas, subject, plan_weights(atlas, WeightOptions((f"{key}:{last}:5",), 1))).rows
    assert [row["removed"] for row in rows] == [None, "the weight", "row + 1", "the channel"]
    assert torch.equal(matrix, before)
    for row, places in zip(rows[1:], ((last, 5), (0, 5), (slice(None), 5)), strict=True):
        with torch.no_grad():
            matrix[places] = 0.0
        assert row["nll"] == pytest.approx(nll_by_hand(subject), rel=1e-9)
        assert row["delta_nll"] == pytest.approx(row["nll"] - rows[0]["nll"], abs=1e-12)
        with torch.no_grad():
            matrix.copy_(before)
    assert len({row["nll"] for row in rows}) == 4
    with pytest.raises(UsageError, match=f"has no row {last + 1}"):
        run(atlas, subject, plan_weights(atlas, WeightOptions((f"{key}:{last + 1}:5",))))
    for wrong in ("1:2", f"{key}:x:5", f"{key}:0:99999"):
        with pytest.raises(UsageError, match="--weight"):
            plan_weights(atlas, WeightOptions((wrong,)))


def test_replaceability_refuses_routed_experts(mixtral: Tiny) -> None:
    """Here, because the model is here."""
    atlas, subject = mixtral.subject()
    with pytest.raises(UsageError, match="routed experts"):
        replaceability(atlas, subject, options=ReplaceabilityOptions(("1/0:0-3",)))
