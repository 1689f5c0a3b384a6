"""Layers that stock transformers does not load are cut too, dropped, or the cut is refused. No file has two widths."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest
import torch
import transformers

from chanfmt.base.errors import ModelError, UsageError
from chanfmt.models.accounting import account
from chanfmt.models.source import ModelSource
from surgery.cli.main import main
from surgery.cut.apply import apply_plan
from surgery.cut.config_width import find_layout
from surgery.cut.extra_layers import handle_extra_layers
from surgery.cut.options import CutOptions
from surgery.cut.restore import restore
from surgery.result.result import open_result
from tests.support.after import SIZES, add_layer, edit_json, half_plan, qwen3next, saved, tensors

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3next(tmp_path_factory.mktemp("extra") / "model")


def test_the_cut_is_refused_with_both_ways_out(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"mtp\.layers\.0 has FFNs of a width that this cut changes") as caught:
        apply_plan(half_plan(model), ModelSource(model), tmp_path / "out")
    assert "--extra-layers cut" in str(caught.value.hint)
    assert "--extra-layers drop" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_cut_by_the_norms_of_the_weights(model: Path, tmp_path: Path) -> None:
    report = apply_plan(half_plan(model), ModelSource(model), tmp_path / "out", CutOptions(extra_layers="cut"))
    assert report.extra_layers is not None
    assert report.extra_layers.layers == ("mtp.layers.0",)
    assert report.extra_layers.tensors == 5 * 3
    before, after = tensors(model), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["moe_intermediate_size"], config["shared_expert_intermediate_size"]) == (12, 14)
    for kind, width in (*((f"experts.{number}", 12) for number in range(4)), ("shared_expert", 14)):
        stem = f"mtp.layers.0.mlp.{kind}."
        gate, up, down = (before[f"{stem}{name}_proj.weight"] for name in ("gate", "up", "down"))
        kept = (gate.norm(dim=1) + up.norm(dim=1) + down.norm(dim=0)).topk(width).indices.sort().values
        assert torch.equal(after[f"{stem}gate_proj.weight"], gate[kept])
        assert torch.equal(after[f"{stem}up_proj.weight"], up[kept])
        assert torch.equal(after[f"{stem}down_proj.weight"], down[:, kept])
    # Every tensor of the extra layer has the shape of the same tensor of the last layer.
    for name, value in after.items():
        if name.startswith("mtp.layers.0."):
            assert value.shape == after[name.replace("mtp.layers.0.", "model.layers.3.")].shape
    record = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert record["extra_layers"] == {
        "choice": "cut",
        "layers": ["mtp.layers.0"],
        "tensors": 15,
        "kept_by": "magnitude",
    }
    assert open_result(tmp_path / "out").report.to_json() == report.to_json()
    assert "by the norms of their weights" in (tmp_path / "out" / "README.md").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.model.layers[0].mlp.experts.gate_up_proj.shape[1] == 24


def test_the_cut_of_extra_layers_is_undone(model: Path, tmp_path: Path) -> None:
    apply_plan(half_plan(model), ModelSource(model), tmp_path / "out", CutOptions(extra_layers="cut"))
    restore(ModelSource(tmp_path / "out"), tmp_path / "wide")
    dense, wide = tensors(model), tensors(tmp_path / "wide")
    assert {name: value.shape for name, value in wide.items()} == {name: value.shape for name, value in dense.items()}
    gate = wide["mtp.layers.0.mlp.experts.2.gate_proj.weight"]
    there = gate.abs().sum(1) > 0
    assert int(there.sum()) == 12
    assert torch.equal(gate[there], dense["mtp.layers.0.mlp.experts.2.gate_proj.weight"][there])
    # transformers does not save what it does not load.
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    restore(ModelSource(tmp_path / "again"), tmp_path / "wider", kept=tmp_path / "out")
    assert not any(name.startswith("mtp.") for name in tensors(tmp_path / "wider"))


def test_dropped_with_its_config_field(model: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(model, tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", mtp_num_hidden_layers=1, mtp_loss_factor=0.3)
    plan = half_plan(tmp_path / "model")
    report = apply_plan(plan, ModelSource(tmp_path / "model"), tmp_path / "out", CutOptions(extra_layers="drop"))
    assert not any(name.startswith("mtp.") for name in tensors(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mtp_num_hidden_layers"], config["mtp_loss_factor"]) == (0, 0.3)
    assert report.extra_layers is not None
    assert set(report.extra_layers.layers) == {"mtp", "mtp.layers.0"}
    assert report.config_fields["mtp_num_hidden_layers"].after == 0
    assert open_result(tmp_path / "out").report.to_json() == report.to_json()
    # What was dropped does not come back.
    restore(ModelSource(tmp_path / "out"), tmp_path / "wide")
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["mtp_num_hidden_layers"] == 0


def test_a_layer_after_the_last(tmp_path: Path) -> None:
    """GLM-4.5 and DeepSeek-V3 number the layer for multi-token prediction after the model's own layers."""
    config = transformers.Glm4MoeConfig(
        **SIZES | {"num_hidden_layers": 46},
        intermediate_size=48,
        moe_intermediate_size=24,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=45,
    )
    model = saved(transformers.Glm4MoeForCausalLM(config), tmp_path / "model")
    add_layer(model, "model.layers.45.", "model.layers.46.", {"model.layers.46.eh_proj.weight": torch.randn(32, 64)})
    assert json.loads((model / "config.json").read_text())["num_nextn_predict_layers"] == 1
    plan = half_plan(model)
    with pytest.raises(ModelError, match=r"model\.layers\.46 has FFNs"):
        apply_plan(plan, ModelSource(model), tmp_path / "out", CutOptions(verify=False))
    apply_plan(plan, ModelSource(model), tmp_path / "cut", CutOptions(verify=False, extra_layers="cut"))
    cut = tensors(tmp_path / "cut")
    for name, value in cut.items():
        if name.startswith("model.layers.46.mlp"):
            assert value.shape == cut[name.replace(".46.", ".45.")].shape
    apply_plan(plan, ModelSource(model), tmp_path / "dropped", CutOptions(verify=False, extra_layers="drop"))
    assert not any(".46." in name for name in tensors(tmp_path / "dropped"))
    assert json.loads((tmp_path / "dropped" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_tensor_that_nothing_explains(model: Path, tmp_path: Path) -> None:
    """It has the sizes of an FFN's matrix under a name of its own, so nobody can say which axis holds channels."""
    import shutil

    shutil.copytree(model, tmp_path / "model")
    add_layer(
        tmp_path / "model", "none", "none", {"mtp.draft.weight": torch.randn(24, 32), "mtp.other.weight": torch.randn(9, 32)}
    )
    plan = half_plan(tmp_path / "model")
    with pytest.raises(ModelError, match=r"the tensor 'mtp\.draft\.weight'"):
        apply_plan(plan, ModelSource(tmp_path / "model"), tmp_path / "out", CutOptions(extra_layers="cut"))
    apply_plan(plan, ModelSource(tmp_path / "model"), tmp_path / "out", CutOptions(extra_layers="drop"))
    assert not any(name.startswith("mtp.") for name in tensors(tmp_path / "out"))


def test_a_model_without_extra_layers_takes_the_option(tmp_path: Path) -> None:
    from tests.support.after import llama

    plan = half_plan(llama(tmp_path / "model"))
    for choice in ("cut", "drop"):
        report = apply_plan(plan, ModelSource(tmp_path / "model"), tmp_path / choice, CutOptions(extra_layers=choice))
        assert report.extra_layers is None


def test_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half_plan(model, tmp_path / "plan")
    line = ["apply", str(tmp_path / "plan"), "--model", str(model), "-o", str(tmp_path / "out"), "--no-verify", "--quiet"]
    assert main(line) == 2
    assert "--extra-layers drop" in capsys.readouterr().err
    assert main([*line, "--extra-layers", "keep"]) == 2
    assert "choose from cut, drop" in capsys.readouterr().err
    assert main([*line, "--extra-layers", "drop"]) == 0
    with pytest.raises(UsageError, match="unknown choice"):
        CutOptions(extra_layers="keep").check()


def test_layers_that_another_class_loads_can_only_be_dropped(model: Path) -> None:
    """That class may have a width field of its own for them, so nobody can say at which width it wants them."""
    plan, source = half_plan(model), ModelSource(model)
    accounting = account(source)
    groups = tuple(dataclasses.replace(group, head=True) for group in accounting.unloaded)
    accounting = dataclasses.replace(accounting, unloaded=groups)
    layout = find_layout(plan, source.config_fields, source.index)
    with pytest.raises(ModelError, match="nothing tells which of its axes holds channels"):
        handle_extra_layers(plan, layout, source.index, accounting, "cut")
    dropped = handle_extra_layers(plan, layout, source.index, accounting, "drop").dropped
    assert all(name.startswith("mtp.layers.0.") for name in dropped)
    assert len(dropped) == 25
