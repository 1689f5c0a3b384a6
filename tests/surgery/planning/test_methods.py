"""Every method against its formula, written out."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest

from chanfmt.base.errors import AtlasError, UsageError
from chanfmt.format.reader import Atlas
from chanfmt.format.writer import write_atlas
from surgery.planning.methods import METHODS, ranked_by_magnitude, score, scored
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from tests.support.edited import edited
from tests.support.factory import moe_atlas, moe_content, random_atlas, random_content

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return Atlas.open(random_atlas(tmp_path_factory.mktemp("atlas") / "a.h5", layers=3, channels=37))


def expected_scores(atlas: Atlas, row: int) -> dict[str, np.ndarray]:
    content = atlas.stacks["decoder"]
    v = {
        name: content[name][row].astype(np.float64)
        for name in content.variables
        if content[name].ndim == 2 and content[name].shape[0] == 3
    }
    tokens = float(content["tokens"][row])
    lp, protection, conn = v["lp"], v["protection"], v["connectivity"]
    return {
        "scar-lp": lp,
        "scar-prot": lp * protection,
        "scar-conn": lp * ((1 - conn) + conn * protection),
        "taylor": v["taylor"],
        "activation": v["activation_power"],
        "wanda": np.sqrt(v["activation_power"]) * v["write_norm_l1"],
        "wanda-group": v["wanda_group"],
        "flap": (v["sum_u2"] / tokens - (v["sum_u"] / tokens) ** 2) * v["write_norm"] ** 2,
        "magnitude": v["write_norm"] + v["up_norm"] + v["gate_norm"],
        "random": np.random.default_rng([7, row]).random(37),
    }


def test_every_method_is_its_formula(atlas: Atlas) -> None:
    for block in atlas.blocks:
        expected = expected_scores(atlas, block.row)
        assert expected.keys() == METHODS.keys()
        for name, values in expected.items():
            found = score(name, atlas, block, seed=7)
            assert found.dtype == np.float64
            assert found.shape == (37,)
            np.testing.assert_allclose(found, values, rtol=1e-12, err_msg=name)


def test_magnitude_without_gate(tmp_path: Path) -> None:
    content = random_content(layers=1, channels=11)
    stack = dataclasses.replace(content.stacks[0], gated=False)
    atlas = edited(tmp_path / "a.h5", dataclasses.replace(content, stacks=(stack,)), gate_norm=None)
    values = atlas.stacks["decoder"]
    np.testing.assert_allclose(
        score("magnitude", atlas, atlas.blocks[0]),
        values["write_norm"][0].astype(np.float64) + values["up_norm"][0].astype(np.float64),
    )


def test_flap_of_a_constant_channel_is_zero_and_never_below(tmp_path: Path) -> None:
    content = random_content(layers=1, channels=11)
    tokens = content.stacks[0].variables["tokens"]
    mean = np.linspace(0.1, 3.3, 11)
    atlas = edited(tmp_path / "a.h5", content, sum_u=(mean * tokens)[None], sum_u2=(mean**2 * tokens)[None])
    values = score("flap", atlas, atlas.blocks[0])
    assert (values >= 0).all()
    assert (values < 1e-12).all()


def test_random_depends_on_seed_and_layer_only(atlas: Atlas) -> None:
    backwards = [score("random", atlas, block, seed=3) for block in reversed(atlas.blocks)][::-1]
    for block, values in zip(atlas.blocks, backwards, strict=True):
        np.testing.assert_array_equal(score("random", atlas, block, seed=3), values)
    assert not np.array_equal(backwards[0], backwards[1])
    assert not np.array_equal(backwards[0], score("random", atlas, atlas.blocks[0], seed=4))


def test_unknown_method(atlas: Atlas) -> None:
    with pytest.raises(UsageError, match="unknown method 'scar'") as caught:
        score("scar", atlas, atlas.blocks[0])
    assert "scar-prot" in str(caught.value)


def test_wanda_group_needs_its_variable(tmp_path: Path) -> None:
    atlas = edited(tmp_path / "a.h5", random_content(layers=1, channels=11), wanda_group=None)
    with pytest.raises(AtlasError, match="wanda_group"):
        score("wanda-group", atlas, atlas.blocks[0])


def test_a_layer_that_saw_no_token_is_refused(tmp_path: Path) -> None:
    content = random_content(layers=2, channels=11)
    variables = content.stacks[0].variables
    tokens = np.array([0, 512])
    lp = variables["lp"].copy()
    lp[0] = np.nan
    power = lp.copy()
    sums = {name: np.where(tokens[:, None] > 0, variables[name], 0.0) for name in ("sum_u", "sum_u2")}
    atlas = edited(tmp_path / "a.h5", content, tokens=tokens, lp=lp, activation_power=power, **sums)
    for method in ("scar-lp", "scar-prot", "scar-conn", "activation", "wanda", "flap"):
        with pytest.raises(AtlasError, match=r"11 of 11 channels of layer 0 .*no calibration token"):
            score(method, atlas, atlas.blocks[0])
        score(method, atlas, atlas.blocks[1])
    score("magnitude", atlas, atlas.blocks[0])


def test_a_single_missing_value_is_refused(tmp_path: Path) -> None:
    content = random_content(layers=1, channels=11)
    protection = content.stacks[0].variables["protection"].copy()
    protection[0, 4] = np.nan
    atlas = edited(tmp_path / "a.h5", content, protection=protection)
    with pytest.raises(AtlasError, match="1 of 11 channels"):
        score("scar-prot", atlas, atlas.blocks[0])


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return Atlas.open(moe_atlas(tmp_path_factory.mktemp("atlas") / "e.h5"))


@pytest.mark.parametrize("method", list(METHODS))
def test_every_expert_is_scored_like_a_dense_ffn(experts: Atlas, method: str) -> None:
    block = experts.blocks[2]
    found = score(method, experts, block, seed=7)
    assert found.shape == (4, 24)
    stack = experts.stacks["decoder.experts"]
    v = {name: stack[name][1].astype(np.float64) for name in stack.variables if stack[name].shape[:1] == (3,)}
    conn, protection = v["connectivity"], v["protection"]
    norms, levels = v["write_norm"] + v["up_norm"] + v["gate_norm"], []
    for expert in range(4):
        tokens = v["tokens"][expert]
        expected = {
            "scar-lp": v["lp"],
            "scar-prot": v["lp"] * protection,
            "scar-conn": v["lp"] * ((1 - conn) + conn * protection),
            "taylor": v["taylor"],
            "activation": v["activation_power"],
            "wanda": np.sqrt(v["activation_power"]) * v["write_norm_l1"],
            "wanda-group": v["wanda_group"],
            "flap": (v["sum_u2"] / tokens - (v["sum_u"] / tokens) ** 2) * v["write_norm"] ** 2,
            "magnitude": norms,
            "random": np.random.default_rng([7, 2]).random((4, 24)),
        }[method]
        wanted = np.asarray(expected[expert])
        if METHODS[method].needs_tokens:
            # On a logarithmic scale, a score lies between what was measured and what the norms let expect.
            share = tokens / (tokens + scored(method, experts, block).half)
            offsets = np.log(found[expert]) - share * np.log(wanted) - (1 - share) * np.log(norms[expert])
            assert 0.5 < share < 1
            levels.append(offsets / (1 - share))
        else:
            np.testing.assert_allclose(found[expert], wanted, rtol=1e-12, err_msg=method)
    if levels:
        np.testing.assert_allclose(levels, np.full_like(levels, np.mean(levels)), rtol=1e-9, err_msg=method)


@pytest.mark.parametrize("method", list(METHODS))
def test_an_expert_without_tokens_is_ranked_by_magnitude(experts: Atlas, method: str) -> None:
    block = experts.blocks[1]
    needs = method not in ("magnitude", "random")
    np.testing.assert_array_equal(ranked_by_magnitude(method, experts, block), [False, needs, False, False])
    values = score(method, experts, block)
    assert np.isfinite(values).all()
    ratio = values[1] / score("magnitude", experts, block)[1]
    assert np.allclose(ratio, ratio[0], rtol=1e-12) == (method != "random")
    assert not np.array_equal(values[0], score("magnitude", experts, block)[0]) or method == "magnitude"
    assert not ranked_by_magnitude(method, experts, experts.blocks[0]).size


def test_a_missing_value_of_an_expert_with_tokens_is_refused(tmp_path: Path) -> None:
    content = moe_content()
    stack = content.stacks[1]
    taylor = stack.variables["taylor"].copy()
    taylor[0, 2, 5] = np.nan
    changed = dataclasses.replace(stack, variables={**stack.variables, "taylor": taylor})
    write_atlas(dataclasses.replace(content, stacks=(content.stacks[0], changed)), tmp_path / "a.h5")
    with Atlas.open(tmp_path / "a.h5") as atlas, pytest.raises(AtlasError, match=r"1 of 96 channels .*no value there"):
        score("taylor", atlas, atlas.blocks[1])


@pytest.mark.parametrize("method", ["scar-prot", "scar-conn"])
def test_a_method_that_lacks_its_protection_says_so(tmp_path: Path, method: str) -> None:
    content = random_content()
    with edited(tmp_path / "whole.h5", content) as whole:
        assert make_plan(whole, PlanOptions(0.5, method)).warnings == ()
    ones = np.ones_like(content.stacks[0].variables["protection"])
    with edited(tmp_path / "merged.h5", content, redundancy=None, redundancy_null=None, protection=ones) as merged:
        plan = make_plan(merged, PlanOptions(0.5, method))
        same = make_plan(merged, PlanOptions(0.5, "scar-lp"))
    assert any(f"{method} ranks channels as scar-lp does" in warning for warning in plan.warnings)
    assert same.warnings == ()
    for one, other in zip(plan.blocks, same.blocks, strict=True):
        np.testing.assert_array_equal(one.kept, other.kept)


@pytest.mark.parametrize(
    ("method", "missing", "way_out"),
    [
        ("scar-conn", "connectivity", "atlas label FILE --model MODEL"),
        ("wanda-group", "wanda_group", "use the atlas of one build"),
        ("flap", "sum_u", "before atlas strip"),
    ],
)
def test_the_hint_says_where_a_missing_variable_comes_from(tmp_path: Path, method: str, missing: str, way_out: str) -> None:
    content = dataclasses.replace(random_content(), dropped=(missing,))
    with edited(tmp_path / "a.h5", content, **{missing: None}) as atlas, pytest.raises(AtlasError) as caught:
        make_plan(atlas, PlanOptions(0.5, method))
    assert f"holds no '{missing}'" in caught.value.message
    assert way_out in str(caught.value.hint)
