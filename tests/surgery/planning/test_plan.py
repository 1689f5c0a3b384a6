"""Plans: what is kept, what is refused, and the plan file."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from chanfmt.base.errors import AtlasError, UsageError
from chanfmt.format import schema
from chanfmt.format.reader import Atlas
from chanfmt.format.writer import write_atlas
from surgery.planning.file import PLAN_FORMAT, load_plan, save_plan
from surgery.planning.methods import METHODS, score
from surgery.planning.options import PlanOptions
from surgery.planning.plan import PruningPlan, make_plan
from tests.support.edited import edited
from tests.support.factory import moe_atlas, random_atlas, random_content


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return Atlas.open(random_atlas(tmp_path_factory.mktemp("atlas") / "a.h5", layers=3, channels=137))


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_lowest_scores_go_and_supernodes_stay(atlas: Atlas, method: str, sparsity: float) -> None:
    plan = make_plan(atlas, PlanOptions(sparsity, method, protect=("supernodes",), seed=2))
    assert plan.protect == ("supernodes",)
    for block, planned in zip(atlas.blocks, plan.blocks, strict=True):
        kept, removed = planned.kept, planned.removed_of(0)
        assert kept.dtype == np.int32
        assert (np.diff(kept) > 0).all()
        assert sorted([*kept, *removed]) == list(range(137))
        core = np.flatnonzero(atlas.stacks["decoder"].row("label", block.row) == schema.LABEL_SUPERNODE)
        assert set(core) <= set(kept)
        assert planned.supernodes == planned.supernodes_kept == len(core)
        values = score(method, atlas, block, 2)
        free = np.setdiff1d(kept, core)
        assert values[free].min() >= values[removed].max()
        lp = atlas.stacks["decoder"].row("lp", block.row).astype(np.float64)
        assert planned.lp_kept == pytest.approx(lp[kept].sum() / lp.sum())
    # A kept width is a multiple of 32, and at least 32.
    assert plan.sparsity_reached == pytest.approx(sparsity, abs=32 / 137)


def test_scar_always_protects_and_others_do_not(atlas: Atlas) -> None:
    assert make_plan(atlas, PlanOptions(0.5, "scar-lp", protect=("none",))).protect == ("supernodes", "none")
    plan = make_plan(atlas, PlanOptions(0.9, "random"))
    assert plan.protect == ()
    assert sum(block.supernodes_kept for block in plan.blocks) < sum(block.supernodes for block in plan.blocks)


def test_ties_keep_the_lowest_index(tmp_path: Path) -> None:
    content = random_content(layers=1, channels=11)
    lp = np.array([[1, 5, 1, 1, 5, 1, 1, 1, 1, 1, 9]], dtype=np.float32)
    atlas = edited(tmp_path / "a.h5", content, lp=lp)
    plan = make_plan(atlas, PlanOptions(0.5, "scar-lp"))
    core = np.flatnonzero(atlas.stacks["decoder"]["label"][0] == schema.LABEL_SUPERNODE)
    expected = list(dict.fromkeys([*core, 10, 1, 4, 0, 2, 3, 5, 6]))[:6]
    assert list(plan.blocks[0].kept) == sorted(expected)


def test_protected_channels_that_do_not_fit(atlas: Atlas) -> None:
    message = r"layer 2 protects \d+ channels and would keep 64, \d+ too few, and in 1 more"
    with pytest.raises(UsageError, match=message):
        make_plan(atlas, PlanOptions(0.5, protect=("0:0-79", "2:0-99")))


@pytest.mark.parametrize(
    "options",
    [
        PlanOptions(0.0),
        PlanOptions(1.0),
        PlanOptions(0.5, "nope"),
        PlanOptions(0.5, seed=-1),
        PlanOptions(0.5, multiple_of=0),
        PlanOptions(0.5, multiple_of=999),
        PlanOptions(0.5, protect=("haloes",)),
        PlanOptions(0.5, allocation="other"),
        PlanOptions(0.5, max_layer_sparsity=0.7),
        PlanOptions(0.5, allocation="global", max_layer_sparsity=0.0),
        PlanOptions(0.5, allocation="global", max_layer_sparsity=1.1),
        PlanOptions(0.5, allocation="global", max_layer_sparsity=float("nan")),
        PlanOptions(0.5, layers="3"),
        PlanOptions(0.5, layers=""),
        PlanOptions(0.5, stack=("encoder",)),
    ],
)
def test_options_that_mean_nothing(atlas: Atlas, options: PlanOptions) -> None:
    with pytest.raises(UsageError):
        make_plan(atlas, options)


def test_atlases_that_cannot_be_planned(tmp_path: Path) -> None:
    content = random_content(layers=1, channels=11)
    write_atlas(dataclasses.replace(content, status="partial"), tmp_path / "p.h5")
    with pytest.raises(AtlasError, match="unfinished"):
        make_plan(Atlas.open(tmp_path / "p.h5"), PlanOptions(0.5))


def test_ffns_of_one_module_have_names_of_their_own(tmp_path: Path) -> None:
    content = random_content(layers=2, channels=11)
    module = content.blocks[0].module
    same = dataclasses.replace(content, blocks=(content.blocks[0], dataclasses.replace(content.blocks[1], module=module)))
    write_atlas(same, tmp_path / "s.h5")
    plan = make_plan(Atlas.open(tmp_path / "s.h5"), PlanOptions(0.5))
    assert [block.name for block in plan.blocks] == [f"{module}#0", f"{module}#1"]
    save_plan(plan, tmp_path / "plan")
    assert_same_plan(load_plan(tmp_path / "plan"), plan)


def test_missing_scores_are_refused(tmp_path: Path) -> None:
    content = random_content(layers=2, channels=11)
    taylor = content.stacks[0].variables["taylor"].copy()
    taylor[1, 3] = np.nan
    with pytest.raises(AtlasError, match="layer 1"):
        make_plan(edited(tmp_path / "a.h5", content, taylor=taylor), PlanOptions(0.5, "taylor"))


def test_plans_are_reproducible_and_nested(atlas: Atlas) -> None:
    first, second = (make_plan(atlas, PlanOptions(0.5, "wanda")) for _ in range(2))
    smaller = make_plan(atlas, PlanOptions(0.7, "wanda"))
    for one, two, three in zip(first.blocks, second.blocks, smaller.blocks, strict=True):
        np.testing.assert_array_equal(one.kept, two.kept)
        assert set(three.kept) < set(one.kept)


def assert_same_plan(one: PruningPlan, two: PruningPlan) -> None:
    for field in dataclasses.fields(one):
        if field.name not in ("blocks", "warnings", "evidence", "model_config"):
            assert getattr(one, field.name) == getattr(two, field.name), field.name
    for mine, yours in zip(one.blocks, two.blocks, strict=True):
        for field in dataclasses.fields(mine):
            np.testing.assert_array_equal(getattr(mine, field.name), getattr(yours, field.name))


ASKED = {
    "plain": PlanOptions(0.5, multiple_of=8),
    "much": PlanOptions(
        0.3,
        "wanda",
        protect=("halo", "1:3-5"),
        unprotect=("1:4",),
        allocation="global",
        max_layer_sparsity=0.6,
        layers="1-2",
        stack=("decoder",),
        seed=3,
    ),
    "inverted": PlanOptions(0.5, "random", invert=True),
}


@pytest.mark.parametrize("options", ASKED.values(), ids=ASKED)
def test_plan_file_round_trip(atlas: Atlas, tmp_path: Path, options: PlanOptions) -> None:
    plan = make_plan(atlas, options)
    save_plan(plan, tmp_path / "plan")
    assert_same_plan(load_plan(tmp_path / "plan"), plan)
    tensors = load_file(tmp_path / "plan")
    assert tensors.keys() == {block.module for block in atlas.blocks}
    assert all(tensor.dtype == np.int32 for tensor in tensors.values())
    assert plan.check_tokens == tuple(atlas.calibration.token_ids[0][:128])
    for name in (
        "method",
        "seed",
        "sparsity",
        "multiple_of",
        "allocation",
        "max_layer_sparsity",
        "layers",
        "stack",
        "invert",
        "unprotect",
    ):
        assert getattr(plan, name) == getattr(options, name), name
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_plan_file_with_experts_round_trip(tmp_path: Path) -> None:
    with Atlas.open(moe_atlas(tmp_path / "e.h5")) as atlas:
        plan = make_plan(atlas, PlanOptions(0.5, "wanda", protect=("halo",)))
    save_plan(plan, tmp_path / "plan")
    assert_same_plan(load_plan(tmp_path / "plan"), plan)
    assert [block.kept.shape for block in plan.blocks] == [(64,), (4, 12), (4, 12), (4, 12)]
    assert len(np.unique(plan.blocks[1].kept, axis=0)) == 4


def test_plan_without_stored_tokens(tmp_path: Path) -> None:
    content = random_content(layers=1, channels=11)
    calibration = dataclasses.replace(content.calibration, token_ids=None)
    write_atlas(dataclasses.replace(content, calibration=calibration), tmp_path / "a.h5")
    assert make_plan(Atlas.open(tmp_path / "a.h5"), PlanOptions(0.5)).check_tokens == ()


def hostile(path: Path, source: Path, **changes: Any) -> Path:
    """The plan ``source`` with entries of its JSON replaced, and with other ``tensors`` if they are given."""
    from safetensors import safe_open

    tensors = changes.pop("tensors", None) or load_file(source)
    with safe_open(source, "np") as file:
        value = json.loads(file.metadata()["plan"])
    block = changes.pop("block", {})
    value["blocks"][0] |= block
    save_file(tensors, path, {"format": changes.pop("format", PLAN_FORMAT), "plan": json.dumps(value | changes)})
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"method": 3},
        {"sparsity": None},
        {"sparsity": float("nan")},
        {"seed": True},
        {"blocks": []},
        {"blocks": [3]},
        {"blocks": {}},
        {"model": None},
        {"model": {}},
        {"protection": "none"},
        {"protection": [3]},
        {"protection": [{"selector": "halo", "selected": "9", "new": 1, "safe": 1, "cost": 1}]},
        {"invert": 0},
        {"invert": None},
        {"scope_channels": 0},
        {"scope_channels": 2.5},
        {"layers": 3},
        {"stack": "decoder"},
        {"max_layer_sparsity": "1"},
        {"allocation": None},
        {"unprotect": [1]},
        {"released": True},
        {"check_tokens": ["x"]},
        {"block": {"name": "elsewhere"}},
        {"block": {"n_channels": 5}},
        {"block": {"n_channels": -1}},
        {"block": {"tensors": [{}]}},
        {"block": {"tensors": None}},
        {"block": {"lp_kept": "x"}},
        {"block": {"layer_index": 1.5}},
    ],
)
def test_hostile_plan_json(atlas: Atlas, tmp_path: Path, changes: dict[str, Any]) -> None:
    save_plan(make_plan(atlas, PlanOptions(0.5)), tmp_path / "plan")
    with pytest.raises(UsageError, match="is not a pruning plan"):
        load_plan(hostile(tmp_path / "bad", tmp_path / "plan", **changes))


@pytest.mark.parametrize("ids", [[3, 2], [2, 2], [-1, 4], [5, 137], []])
def test_hostile_plan_channels(atlas: Atlas, tmp_path: Path, ids: list[int]) -> None:
    save_plan(make_plan(atlas, PlanOptions(0.5)), tmp_path / "plan")
    tensors = load_file(tmp_path / "plan")
    tensors[atlas.blocks[0].module] = np.array(ids, dtype=np.int32)
    with pytest.raises(UsageError, match="not ascending ids"):
        load_plan(hostile(tmp_path / "bad", tmp_path / "plan", tensors=tensors))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.arange(12), "not those of 4 experts"),
        (np.tile(np.arange(12), (3, 1)), "not those of 4 experts"),
        (np.tile(np.arange(13, 25), (4, 1)), "not ascending ids"),
        (np.array([[0, 1], [0, 1], [1, 0], [0, 1]]), "not ascending ids"),
        (np.zeros((4, 0)), "not ascending ids"),
    ],
)
def test_hostile_expert_channels(tmp_path: Path, ids: np.ndarray, message: str) -> None:
    with Atlas.open(moe_atlas(tmp_path / "e.h5")) as atlas:
        save_plan(make_plan(atlas, PlanOptions(0.5)), tmp_path / "plan")
    tensors = load_file(tmp_path / "plan")
    tensors["model.layers.1.mlp.experts"] = ids.astype(np.int32)
    with pytest.raises(UsageError, match=message):
        load_plan(hostile(tmp_path / "bad", tmp_path / "plan", tensors=tensors))


def test_damaged_plan_files(atlas: Atlas, tmp_path: Path) -> None:
    save_plan(make_plan(atlas, PlanOptions(0.5)), tmp_path / "plan")
    raw = (tmp_path / "plan").read_bytes()
    for cut in (0, 4, 8, 100, len(raw) - 1):
        (tmp_path / "bad").write_bytes(raw[:cut])
        with pytest.raises(UsageError, match="is not a pruning plan"):
            load_plan(tmp_path / "bad")
    with pytest.raises(UsageError, match="missing does not exist"):
        load_plan(tmp_path / "missing")
    save_file({"a": np.zeros(3, dtype=np.float32)}, tmp_path / "weights")
    with pytest.raises(UsageError, match="its format"):
        load_plan(tmp_path / "weights")


def test_a_plan_from_python_is_numpy_alone(atlas: Atlas) -> None:
    code = (
        "import sys; from surgery.planning.plan import make_plan; from surgery.planning.options import PlanOptions\n"
        f"from chanfmt.format.reader import Atlas; atlas = Atlas.open({str(atlas.path)!r})\n"
        "print(make_plan(atlas, PlanOptions(0.5, protect='halo')))\n"
        "heavy = ('torch', 'transformers', 'huggingface_hub', 'surgery.cut', 'surgery.recovery', 'surgery.result', 'chanfmt.models')\n"
        "assert not set(heavy) & set(sys.modules), set(heavy) & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "FFNs, 411 to " in done.stdout


@pytest.mark.parametrize("name", ["protect", "unprotect", "stack"])
def test_options_take_one_text_or_several(name: str) -> None:
    for given in ("decoder", ["decoder"], ("decoder",), Path("decoder")):
        assert getattr(PlanOptions(0.5, **{name: given}), name) == ("decoder",)


def test_plans_say_what_they_are(atlas: Atlas) -> None:
    plan = make_plan(atlas, PlanOptions(0.5))
    model = dataclasses.replace(plan.model, id="meta-llama/<b>Llama\x1b")
    named = dataclasses.replace(plan, model=model)
    kept = plan.channels_kept
    assert repr(named) == f"<PruningPlan of <b>Llama\ufffd: 3 FFNs, 411 to {kept} channels ({kept / 411 - 1:.1%}), scar-prot>"
    page = named._repr_html_()
    assert "<b>" not in page
    assert "\x1b" not in page
    assert page.count("<tr>") == 4
    assert "&lt;PruningPlan of &lt;b&gt;Llama" in page


def test_errors_of_plan_files_name_the_field(atlas: Atlas, tmp_path: Path) -> None:
    save_plan(make_plan(atlas, PlanOptions(0.5)), tmp_path / "plan")
    for changes, message in (
        ({"block": {"lp_kept": "x"}}, r"blocks\[0\].lp_kept is not valid: expected float \| null, got str"),
        ({"seed": True}, "seed is not valid: expected int, got bool"),
        ({"method": 3}, "method is not valid: expected str, got int"),
        ({"protection": [{"selector": "halo"}]}, r"protection\[0\] is not valid: object missing required field selected"),
    ):
        with pytest.raises(UsageError, match=message):
            load_plan(hostile(tmp_path / "bad", tmp_path / "plan", **changes))


def test_keys_of_later_versions_are_skipped(atlas: Atlas, tmp_path: Path) -> None:
    plan = make_plan(atlas, PlanOptions(0.5))
    save_plan(plan, tmp_path / "plan")
    assert_same_plan(load_plan(hostile(tmp_path / "new", tmp_path / "plan", news=1, block={"news": [2]})), plan)


def test_planning_never_imports_torch(atlas: Atlas, tmp_path: Path) -> None:
    code = (
        "import sys; from surgery.cli.main import main\n"
        f"assert main(['plan', {str(atlas.path)!r}, '--sparsity', '0.5', '-o', {str(tmp_path / 'plan')!r}]) == 0\n"
        "assert not {'torch', 'transformers', 'textual'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0.5 asked" in done.stdout
    assert load_plan(tmp_path / "plan").channels == 3 * 137


def test_a_plan_that_says_something_twice_is_refused(atlas: Atlas, tmp_path: Path) -> None:
    """Of two values, one program reads the first and another the last."""
    path = tmp_path / "p.safetensors"
    save_plan(make_plan(atlas, PlanOptions(0.5)), path)
    image = path.read_bytes()
    size = int.from_bytes(image[:8], "little")
    header = json.loads(image[8 : 8 + size])
    for inside in (False, True):
        text = header["__metadata__"]["plan"]
        text = text.replace('"model":{', '"model":{"id":"another/model",', 1) if inside else '{"method":"random",' + text[1:]
        changed = json.dumps(header | {"__metadata__": header["__metadata__"] | {"plan": text}}).encode()
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + image[8 + size :])
        with pytest.raises(UsageError, match="a name appears twice"):
            load_plan(path)
