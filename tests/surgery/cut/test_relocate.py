"""A plan finds its tensors by parameter: under any prefix and head, and after transformers saved the result again."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import torch
import transformers

from chanfmt.base.errors import ModelError, UsageError
from chanfmt.models.source import ModelSource
from surgery.cli.main import main
from surgery.cut.apply import apply_plan
from surgery.cut.options import CutOptions
from surgery.cut.relocate import Prefix, find_prefix
from surgery.cut.restore import restore
from surgery.planning.file import load_plan
from surgery.result.result import open_result
from tests.support.after import IDS, half_plan, legacy_gpt2, llama, masked, tensors, tuned

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from surgery.planning.plan import PruningPlan


@pytest.mark.parametrize(
    ("wanted", "present", "expected"),
    [
        (["a.0.w", "a.1.w"], ["a.0.w", "a.1.w", "x"], Prefix("", "")),
        (["h.0.w", "h.1.w"], ["transformer.h.0.w", "transformer.h.1.w"], Prefix("", "transformer.")),
        (["model.h.0.w", "model.h.1.w"], ["h.0.w", "h.1.w"], Prefix("model.", "")),
        (["a.b.h.0.w"], ["c.h.0.w"], Prefix("a.b.", "c.")),
        # Two towers: nothing says which one is meant.
        (["h.0.w"], ["encoder.h.0.w", "decoder.h.0.w"], None),
        # Another layer is not another prefix.
        (["h.0.mlp.w"], ["h.1.mlp.w"], None),
        (["h.0.w", "h.1.w"], ["x.h.0.w", "y.h.1.w"], None),
        (["h.0.w"], [], None),
    ],
)
def test_one_rule_for_all_names(wanted: Sequence[str], present: Sequence[str], expected: Prefix | None) -> None:
    assert find_prefix(wanted, present) == expected


def test_a_fine_tune_with_the_prefix_that_the_base_lacks(tmp_path: Path) -> None:
    plan = half_plan(legacy_gpt2(tmp_path / "model"))
    assert plan.blocks[0].tensors[0].tensor.startswith("h.0.")
    tune = tuned(tmp_path / "model", transformers.GPT2LMHeadModel, tmp_path / "tuned")
    assert "transformer.h.0.mlp.c_fc.weight" in tensors(tune)
    report = apply_plan(plan, ModelSource(tune), tmp_path / "out", CutOptions(fine_tune=True))
    assert report.logits is not None
    with torch.inference_mode():
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
        expected = masked(transformers.AutoModelForCausalLM.from_pretrained(tune), plan)(IDS).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_fine_tune_with_another_head(tmp_path: Path) -> None:
    plan = half_plan(llama(tmp_path / "model"))
    kind = transformers.LlamaForSequenceClassification
    tune = tuned(tmp_path / "model", kind, tmp_path / "tuned", num_labels=2, pad_token_id=1)
    report = apply_plan(plan, ModelSource(tune), tmp_path / "out", CutOptions(fine_tune=True))
    assert report.logits is not None
    assert report.loader == "AutoModelForSequenceClassification"
    assert "AutoModelForSequenceClassification.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    cut, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    with torch.inference_mode():
        expected = masked(kind.from_pretrained(tune), plan)(IDS).logits
        assert torch.allclose(cut.eval()(IDS).logits, expected, atol=1e-5)
    # The copy of the plan names the tensors of the fine-tune, and undoes the cut.
    restored = restore(ModelSource(tmp_path / "out"), tmp_path / "back")
    assert restored.relative_error is not None


def test_a_model_of_other_layers_is_refused(tmp_path: Path) -> None:
    plan = half_plan(llama(tmp_path / "model"))
    config = transformers.LlamaConfig.from_pretrained(tmp_path / "model", num_hidden_layers=1)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"no tensor 'model\.layers\.1\.mlp"):
        apply_plan(plan, ModelSource(tmp_path / "other"), tmp_path / "out", CutOptions(fine_tune=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_result_that_was_trained_and_saved_again(kind: str, tmp_path: Path) -> None:
    """save_pretrained changes prefixes, shards and the dtype, and writes no list of kept channels."""
    plan = half_plan({"gpt2": legacy_gpt2, "llama": llama}[kind](tmp_path / "model"))
    apply_plan(plan, ModelSource(tmp_path / "model"), tmp_path / "cut")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    with pytest.raises(UsageError, match=r"has no kept_channels\.safetensors") as caught:
        restore(ModelSource(tmp_path / "again"), tmp_path / "wide")
    assert "--kept RESULT" in str(caught.value.hint)
    for number, kept in enumerate((tmp_path / "cut", tmp_path / "cut" / "kept_channels.safetensors")):
        wide = tmp_path / f"wide{number}"
        restored = restore(ModelSource(tmp_path / "again"), wide, kept=kept)
        assert restored.relative_error is not None
        assert restored.relative_error <= 1e-4
        back = transformers.AutoModelForCausalLM.from_pretrained(wide)
        assert back.dtype == torch.bfloat16
        dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        shapes = {name: value.shape for name, value in dense.state_dict().items()}
        assert {name: value.shape for name, value in back.state_dict().items()} == shapes
    with pytest.raises(UsageError, match="nowhere does not exist"):
        restore(ModelSource(tmp_path / "again"), tmp_path / "wide", kept=tmp_path / "nowhere")
    arguments = ["restore", str(tmp_path / "again"), "--kept", str(tmp_path / "cut"), "-o", str(tmp_path / "by-line"), "--quiet"]
    assert main(arguments) == 0


def biased(plan: PruningPlan, directory: Path, output: Path) -> None:
    import numpy as np

    from surgery.recovery.options import BiasRecovery

    means = {block.name: np.linspace(0.1, 0.3, block.n_channels) for block in plan.blocks}
    apply_plan(plan, ModelSource(directory), output, recovery=BiasRecovery(means, 100))


def test_the_kept_channels_of_a_result_with_new_biases(tmp_path: Path) -> None:
    """The base model has no biases, and its class has none."""
    plan = half_plan(llama(tmp_path / "model"))
    biased(plan, tmp_path / "model", tmp_path / "biased")
    assert "model.layers.0.mlp.gate_proj.bias" in tensors(tmp_path / "biased")
    apply_plan(plan, ModelSource(tmp_path / "model"), tmp_path / "plain")
    again = load_plan(tmp_path / "biased" / "kept_channels.safetensors")
    apply_plan(again, ModelSource(tmp_path / "model"), tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()
    # The result itself keeps its biases when it is saved again and restored.
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "biased").save_pretrained(tmp_path / "saved")
    restored = restore(ModelSource(tmp_path / "saved"), tmp_path / "wide", kept=tmp_path / "biased")
    assert restored.relative_error is not None
    assert tensors(tmp_path / "wide")["model.layers.0.mlp.gate_proj.bias"].shape == (40,)


def test_a_result_is_read_back_and_copied_as_before(tmp_path: Path) -> None:
    plan = half_plan(llama(tmp_path / "model"))
    report = apply_plan(plan, ModelSource(tmp_path / "model"), tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    assert open_result(tmp_path / "copy").report.to_json() == report.to_json()
