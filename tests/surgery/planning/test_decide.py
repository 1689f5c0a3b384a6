"""What stays under protection, allocation, layers, experts and inversion, and what each protection cost."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest

from chanfmt.base.errors import UsageError
from chanfmt.format import schema
from chanfmt.format.reader import Atlas
from chanfmt.format.writer import write_atlas
from surgery.planning.methods import METHODS, score
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from tests.support.edited import edited
from tests.support.factory import moe_atlas, moe_content, random_atlas, random_content

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.planning.plan import PruningPlan


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return Atlas.open(random_atlas(tmp_path_factory.mktemp("atlas") / "a.h5", layers=4, channels=137))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return Atlas.open(moe_atlas(tmp_path_factory.mktemp("atlas") / "e.h5"))


def kept(plan: PruningPlan) -> list[set[tuple[int, ...]]]:
    """What every FFN keeps, as (expert, channel)."""
    return [
        {(expert, int(channel)) for expert in range(max(1, block.n_experts)) for channel in block.kept_of(expert)}
        for block in plan.blocks
    ]


def uncut(plan: PruningPlan) -> list[bool]:
    return [not block.is_cut for block in plan.blocks]


# Experts


@pytest.mark.parametrize("method", list(METHODS))
def test_every_expert_keeps_its_own_best(experts: Atlas, method: str) -> None:
    plan = make_plan(experts, PlanOptions(0.5, method, seed=3, multiple_of=1))
    for block, planned in zip(experts.blocks, plan.blocks, strict=True):
        values = np.atleast_2d(score(method, experts, block, 3)).copy()
        if METHODS[method].always_protects:
            core = np.atleast_2d(experts.stacks[block.stack]["label"][block.row]) == schema.LABEL_SUPERNODE
            values[core] = np.inf
        for expert, row in enumerate(values):
            best = sorted(range(len(row)), key=lambda channel: (-row[channel], channel))[: planned.n_kept]
            assert planned.kept_of(expert).tolist() == sorted(best)
    assert [block.n_kept for block in plan.blocks] == [48, 12, 12, 12]
    assert plan.channels == 96 + 3 * 96
    assert plan.sparsity_reached == pytest.approx(0.5)
    unseen = [warning for warning in plan.warnings if "1 of 12 experts got no calibration token" in warning]
    assert len(unseen) == (method not in ("magnitude", "random"))


def test_supernodes_and_lp_of_experts_are_counted(experts: Atlas) -> None:
    plan = make_plan(experts, PlanOptions(0.5, "random", seed=1))
    block, planned = experts.blocks[1], plan.blocks[1]
    stack = experts.stacks["decoder.experts"]
    label, q2 = stack["label"][block.row], stack["sum_q2"][block.row]
    stays = np.zeros((4, 24), dtype=bool)
    for expert in range(4):
        stays[expert, planned.kept_of(expert)] = True
    assert planned.supernodes == np.count_nonzero(label == 2) == 3
    assert planned.supernodes_kept == np.count_nonzero(stays & (label == 2))
    # LP is half the mean of q^2 over an expert's tokens, so the share is that of the sums.
    assert planned.lp_kept == pytest.approx(q2[stays].sum() / q2.sum())


def test_protected_channels_of_one_expert_must_fit(experts: Atlas) -> None:
    plan = make_plan(experts, PlanOptions(0.5, protect=("2/1:0-11",), method="magnitude"))
    assert plan.blocks[2].kept_of(1).tolist() == list(range(12))
    assert plan.blocks[2].kept_of(0).tolist() != list(range(12))
    with pytest.raises(UsageError, match="an expert of layer 2 protects 13 channels and would keep 12, 1 too few"):
        make_plan(experts, PlanOptions(0.5, protect=("2/1:0-12",), method="magnitude"))


# Global allocation


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.standardised])
def test_global_takes_the_lowest_of_the_pool(atlas: Atlas, method: str) -> None:
    plan = make_plan(atlas, PlanOptions(0.4, method, allocation="global", multiple_of=1, seed=5))
    uniform = make_plan(atlas, PlanOptions(0.4, method, multiple_of=1, seed=5))
    assert plan.channels_kept == uniform.channels_kept
    label = atlas.stacks["decoder"]["label"]
    most, budget = int(0.7 * 137), plan.channels - uniform.channels_kept
    gone: list[set[int]] = [set() for _ in range(4)]
    pool = sorted(
        (float(value), -block.index, -channel)
        for block in atlas.blocks
        for channel, value in enumerate(score(method, atlas, block, 5))
        if not METHODS[method].always_protects or label[block.row, channel] != schema.LABEL_SUPERNODE
    )
    for _, index, channel in pool:
        if budget and len(gone[-index]) < most:
            gone[-index].add(-channel)
            budget -= 1
    assert [set(block.removed_of(0).tolist()) for block in plan.blocks] == gone
    if method != "random":
        assert len({block.n_kept for block in plan.blocks}) > 1


def test_the_cap_holds_and_can_be_moved(tmp_path: Path) -> None:
    content = random_content(layers=3, channels=100)
    lp = content.stacks[0].variables["lp"] * np.array([[1e-9], [1], [1e9]])
    with edited(tmp_path / "a.h5", content, lp=lp) as atlas:
        for cap, widths in ((None, [30, 80, 100]), (0.5, [50, 60, 100]), (1.0, [10, 100, 100]), (0.3, [70, 70, 70])):
            plan = make_plan(atlas, PlanOptions(0.3, "scar-lp", allocation="global", multiple_of=10, max_layer_sparsity=cap))
            assert [block.n_kept for block in plan.blocks] == widths
        with pytest.raises(UsageError, match=r"0\.2 lets at most 60 of 300 channels go, and a sparsity of 0\.3 removes 90"):
            make_plan(atlas, PlanOptions(0.3, allocation="global", multiple_of=10, max_layer_sparsity=0.2))


@pytest.mark.parametrize(("cap", "fewest"), [(0.29, 71), (1.0, 1)])
def test_the_cap_counts_whole_channels(tmp_path: Path, cap: float, fewest: int) -> None:
    content = random_content(layers=5, channels=100)
    taylor = content.stacks[0].variables["taylor"] * np.array([[1e-9], [1], [1], [1], [1]])
    with edited(tmp_path / "a.h5", content, taylor=taylor) as atlas:
        plan = make_plan(atlas, PlanOptions(0.28, "taylor", allocation="global", multiple_of=1, max_layer_sparsity=cap))
        assert plan.blocks[0].n_kept == fewest
        assert plan.channels_kept == 5 * 72


def test_global_never_takes_protected_channels(atlas: Atlas) -> None:
    chosen = tuple(f"{layer}:0-90" for layer in range(2))
    plan = make_plan(atlas, PlanOptions(0.5, "taylor", protect=chosen, allocation="global", multiple_of=1))
    assert all(set(range(91)) <= set(plan.blocks[layer].kept) for layer in range(2))
    assert plan.channels_kept == 4 * 69
    with pytest.raises(UsageError, match=r"do not fit: .* keep 500 channels, 224 more than a sparsity of 0\.5 leaves"):
        make_plan(
            atlas,
            PlanOptions(0.5, "taylor", protect=tuple(f"{layer}:0-124" for layer in range(4)), allocation="global", multiple_of=1),
        )


@pytest.mark.parametrize("method", ["scar-prot", "flap", "random"])
def test_global_moves_all_experts_of_a_layer_at_once(experts: Atlas, method: str) -> None:
    plan = make_plan(experts, PlanOptions(0.4, method, allocation="global", multiple_of=1))
    ladders = []
    for block in experts.blocks:
        values = np.atleast_2d(score(method, experts, block)).copy()
        if method == "flap":
            values = (values - values.mean(axis=1, keepdims=True)) / values.std(axis=1, keepdims=True)
        if METHODS[method].always_protects:
            values[np.atleast_2d(experts.stacks[block.stack]["label"][block.row]) == schema.LABEL_SUPERNODE] = np.inf
        ladders.append(np.sort(values, axis=1).mean(axis=0))
    removed = [planned.n_channels - planned.n_kept for planned in plan.blocks]
    # The dense FFN also takes what is left of the budget: less than one channel of each of four experts.
    sure = [removed[0] - 3, *removed[1:]]
    last = max(ladder[count - 1] for ladder, count in zip(ladders, sure, strict=True) if count > 0)
    for ladder, count, planned in zip(ladders, removed, plan.blocks, strict=True):
        assert ladder[count] >= last or count == int(0.7 * planned.n_channels)
    uniform = make_plan(experts, PlanOptions(0.4, method, multiple_of=1))
    assert method == "flap" or [block.n_kept for block in plan.blocks] != [block.n_kept for block in uniform.blocks]
    assert abs(plan.channels_kept - uniform.channels_kept) < 4


def test_global_needs_a_layer_that_saw_tokens(tmp_path: Path) -> None:
    content = moe_content()
    stack = content.stacks[1]
    tokens, split = stack.variables["tokens"].copy(), stack.variables["tokens_split"].copy()
    tokens[1], split[:, 1] = 0, 0
    changed = dataclasses.replace(stack, variables={**stack.variables, "tokens": tokens, "tokens_split": split})
    write_atlas(dataclasses.replace(content, stacks=(content.stacks[0], changed)), tmp_path / "a.h5")
    with Atlas.open(tmp_path / "a.h5") as atlas:
        assert "5 of 12 experts" in make_plan(atlas, PlanOptions(0.5, "wanda")).warnings[0]
        with pytest.raises(UsageError, match="any expert of layer 2"):
            make_plan(atlas, PlanOptions(0.5, "wanda", allocation="global"))
        make_plan(atlas, PlanOptions(0.5, "magnitude", allocation="global"))


# Layers, stacks, inversion


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_layers_that_are_not_named_keep_everything(atlas: Atlas, allocation: str) -> None:
    plan = make_plan(atlas, PlanOptions(0.4, layers="0,2-3", allocation=allocation, multiple_of=1))
    assert uncut(plan) == [False, True, False, False]
    assert plan.scope_sparsity_reached == pytest.approx(0.4, abs=0.01)
    assert plan.sparsity_reached == pytest.approx(0.3, abs=0.01)
    if allocation == "uniform":
        whole = kept(make_plan(atlas, PlanOptions(0.4, multiple_of=1)))
        assert [kept(plan)[index] == whole[index] for index in range(4)] == [True, False, True, True]


def test_stacks_restrict_likewise(experts: Atlas) -> None:
    assert uncut(make_plan(experts, PlanOptions(0.5, stack=("decoder.experts",)))) == [True, False, False, False]
    both = PlanOptions(0.5, stack=("decoder.experts", "decoder"), layers="0-1")
    assert uncut(make_plan(experts, both)) == [False, False, True, True]
    with pytest.raises(UsageError, match=r"none of the layers 0 is in the stack decoder\.experts"):
        make_plan(experts, PlanOptions(0.5, stack=("decoder.experts",), layers="0"))


def test_a_layer_that_cannot_be_scored_may_be_left_out(tmp_path: Path) -> None:
    content = random_content(layers=2, channels=11)
    taylor = content.stacks[0].variables["taylor"].copy()
    taylor[1, 3] = np.nan
    with edited(tmp_path / "a.h5", content, taylor=taylor) as atlas:
        assert uncut(make_plan(atlas, PlanOptions(0.5, "taylor", layers="0"))) == [False, True]


@pytest.mark.parametrize(
    "options",
    [
        PlanOptions(0.3),
        PlanOptions(0.3, "random", protect=("halo",), layers="1-2"),
        PlanOptions(0.5, "random", allocation="global", multiple_of=1),
    ],
)
@pytest.mark.parametrize("name", ["atlas", "experts"])
def test_inverting_keeps_the_complement(options: PlanOptions, name: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(name)
    plan = make_plan(found, options)
    inverse = make_plan(found, dataclasses.replace(options, invert=True))
    assert uncut(plan) == uncut(inverse)
    for block, one, two in zip(plan.blocks, kept(plan), kept(inverse), strict=True):
        if block.is_cut:
            every = {(expert, channel) for expert in range(max(1, block.n_experts)) for channel in range(block.n_channels)}
            assert one | two == every
            assert not one & two
    assert inverse.scope_sparsity_reached == pytest.approx(1 - plan.scope_sparsity_reached)
    assert inverse.protection == plan.protection


def test_inverting_may_leave_nothing(tmp_path: Path) -> None:
    content = random_content(layers=2, channels=20)
    lp = content.stacks[0].variables["lp"] * np.array([[1e-9], [1e9]])
    with (
        edited(tmp_path / "a.h5", content, lp=lp) as atlas,
        pytest.raises(UsageError, match="--invert would remove every channel of layer 1"),
    ):
        make_plan(atlas, PlanOptions(0.3, "scar-lp", allocation="global", multiple_of=1, invert=True))


# What protection did


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("name", ["atlas", "experts"])
def test_effects_are_differences_of_plans(name: str, allocation: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(name)
    ids = "1/2:0-5" if name == "experts" else "1:0-30"
    selectors = ("supernodes", "halo@1-2", ids, "none")
    plans = [
        make_plan(found, PlanOptions(0.5, "magnitude", protect=selectors[:number], allocation=allocation, multiple_of=1))
        for number in range(len(selectors) + 1)
    ]
    plan = plans[-1]
    assert plan.protect == selectors
    assert plans[0].protection == ()
    stays = [{(index, *where) for index, block in enumerate(kept(item)) for where in block} for item in plans]
    earlier: set[tuple[int, ...]] = set()
    for number, effect in enumerate(plan.protection):
        named = {
            (block.index, expert, int(channel))
            for block, stack in found.rows()
            for expert, row in enumerate(np.atleast_2d(stack["label"][block.row]))
            for channel in {
                "supernodes": np.flatnonzero(row == 2),
                "halo@1-2": np.flatnonzero((row == 1) & (block.layer_index in (1, 2))),
                "none": np.empty(0),
            }.get(
                effect.selector,
                np.arange(6 if name == "experts" else 31)
                if block.index == 1 and (expert == 2 or name == "atlas")
                else np.empty(0),
            )
        }
        new = named - earlier
        assert (effect.selected, effect.new, effect.safe) == (len(named), len(new), len(new & stays[0]))
        assert effect.cost == len(stays[number] - stays[number + 1])
        if allocation == "uniform":
            assert effect.cost == len(new - stays[number])
        earlier |= named
        assert earlier <= stays[number + 1]
    assert plan.protected == len(earlier)
    assert plan.protection[2].cost > 0


@pytest.mark.parametrize("method", ["scar-lp", "scar-prot", "scar-conn"])
def test_supernodes_cost_the_scar_scores_nothing(atlas: Atlas, method: str) -> None:
    (effect,) = make_plan(atlas, PlanOptions(0.9, method)).protection
    assert effect.new == effect.safe == effect.selected > 0
    assert effect.cost == 0
    assert make_plan(atlas, PlanOptions(0.9, "magnitude", protect=("supernodes",))).protection[0].cost > 0


def test_unprotected_channels_go_by_their_score(atlas: Atlas) -> None:
    options = PlanOptions(0.5, "magnitude", protect=("halo", "2:1-40"), unprotect=("2:1-40",))
    plan = make_plan(atlas, options)
    assert plan.unprotect == ("2:1-40",)
    assert plan.protection[1].new == plan.protection[1].cost == 0
    halo = atlas.stacks["decoder"]["label"] == schema.LABEL_HALO
    lost = np.flatnonzero(halo[2, 1:41]) + 1
    assert plan.released == 40
    assert plan.protected == halo.sum() - len(lost)
    assert not set(range(1, 41)) <= set(plan.blocks[2].kept)
    bare = make_plan(atlas, PlanOptions(0.5, unprotect=("supernodes",)))
    assert (bare.protected, bare.released) == (0, sum(block.supernodes for block in bare.blocks))
