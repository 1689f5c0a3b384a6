"""Every layout that an atlas describes can be cut: random plans over the FFNs that are found in many model types."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers

from chanfmt.base.errors import CheckError, ModelError, UsageError
from chanfmt.models.source import ModelSource
from surgery.cut.apply import KEPT_FILE, apply_plan
from surgery.cut.options import CutOptions
from surgery.cut.restore import restore
from surgery.planning.file import load_applied, load_plan, save_plan
from surgery.result.record import Report, summary_rows
from tests.support import zoo
from tests.support.plans import planned, read
from tests.support.repeated import repeated

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.planning.plan import PruningPlan

CAUSAL = (
    "llama",
    "gpt2",
    "opt",
    "phi3",
    "gptj",
    "falcon",
    "mpt",
    "gemma3_text",
    "mixtral",
    "qwen2_moe",
    "gpt_oss",
    "granitemoe",
    "dbrx",
    "deepseek_v3",
    "llama4_text",
    "bamba",
    "jamba",
    "openai-gpt",
)
OTHER = (
    ("albert", "masked"),
    ("modernbert", "masked"),
    ("t5", "seq2seq"),
    ("bart", "seq2seq"),
    ("vit", "image"),
    ("whisper", "speech"),
)
LIKE_OTHERS = (
    ("gpt_neox", "causal"),
    ("codegen", "causal"),
    ("bloom", "causal"),
    ("qwen3_moe", "causal"),
    ("xglm", "causal"),
    ("bert", "masked"),
    ("wav2vec2", "audio"),
)
"""Their FFNs are stored as those of gptj, mpt, mixtral, opt or bart."""
TYPES = [*((name, "causal") for name in CAUSAL), *OTHER, *repeated(*LIKE_OTHERS)]
FIXED_WIDTH = ("bloom", "openai-gpt", "mpt")
"""Types whose FFN width no config field sets."""
HALF = 0.5


def saved(model_type: str, family: str, directory: Path) -> Path:
    zoo.tiny(model_type, family).save_pretrained(directory)
    return directory


def masked(directory: Path, plan: PruningPlan) -> dict[str, torch.Tensor]:
    """The checkpoint with zeros wherever a removed channel was, straight from the plan's slices."""
    tensors = read(directory)
    for block in plan.blocks:
        seen: dict[str, int] = defaultdict(int)
        for item in block.tensors:
            expert = seen[item.role] if block.n_experts else 0
            seen[item.role] += 1
            if item.axis is None:
                continue
            where: list[Any] = [slice(None)] * tensors[item.tensor].ndim
            if item.index is not None:
                where[0] = item.index
            where[item.axis] = torch.from_numpy(item.indices(block.removed_of(expert)))
            tensors[item.tensor][tuple(where)] = 0
    return tensors


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def zeros(report: Report) -> str:
    return next(value for name, value in summary_rows(report.plan, report) if name == "zero channels")


@pytest.mark.parametrize(("model_type", "family"), TYPES)
def test_every_layout_is_cut_and_restored(model_type: str, family: str, tmp_path: Path) -> None:
    """Cut: passes both checks, and is smaller. Restored: bit for bit the masked dense checkpoint."""
    model = saved(model_type, family, tmp_path / "model")
    plan = planned(model, lambda number, ffn: max(1, int(ffn.width * HALF)))
    if model_type in FIXED_WIDTH:
        with pytest.raises(UsageError, match="no config field that sets the width"):
            apply_plan(plan, ModelSource(model), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    report = apply_plan(plan, ModelSource(model), tmp_path / "out", CutOptions(allow_padding=model_type in FIXED_WIDTH))
    assert report.logits is not None
    assert report.logits.relative_error <= 1e-4
    if model_type in FIXED_WIDTH:
        assert len(report.padded) == len(plan.blocks), "its width is in no field, so that zeros must do"
        assert "no config field" in zeros(report)
    else:
        assert not report.padded
        assert report.bytes_after < report.bytes_before
    restore(ModelSource(tmp_path / "out"), tmp_path / "back")
    assert same(read(tmp_path / "back"), masked(model, plan))
    loaded, info = transformers.AutoModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["mismatched_keys"]
    del loaded
    config, back = (json.loads((place / "config.json").read_text()) for place in (model, tmp_path / "back"))
    assert {name: value for name, value in back.items() if value is not None} == {
        name: value for name, value in config.items() if value is not None
    }


def uneven(number: int, ffn: Any) -> int:
    return int(max(1, ffn.width * (0.3 + 0.2 * (number % 3))))


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "gpt_oss", "mixtral", "granitemoe", "bart"])
def test_uneven_widths_are_filled_up_with_zero_channels(model_type: str, tmp_path: Path) -> None:
    """Zero channels follow the kept channels, in halves, interleaved roles and stacked experts alike."""
    model = saved(model_type, "seq2seq" if model_type == "bart" else "causal", tmp_path / "model")
    plan = planned(model, uneven)
    report = apply_plan(plan, ModelSource(model), tmp_path / "out")
    assert report.logits is not None
    widest = max(block.n_kept for block in plan.blocks)
    if model_type != "bart":  # Its encoder and decoder have a field each.
        assert set(report.applied.widths.values()) == {widest}
    assert {block.name for block in report.padded} == {
        block.name for block in plan.blocks if block.n_kept < report.applied.widths[block.name]
    }
    assert report.padded
    assert report.bytes_after < report.bytes_before
    restore(ModelSource(tmp_path / "out"), tmp_path / "back")
    assert same(read(tmp_path / "back"), masked(model, plan))


def test_a_config_that_holds_a_width_per_layer_needs_no_zeros(tmp_path: Path) -> None:
    model = saved("gemma3n_text", "causal", tmp_path / "model")
    plan = planned(model, uneven)
    with pytest.raises(CheckError, match="from all its channels"):
        apply_plan(plan, ModelSource(model), tmp_path / "out")
    report = apply_plan(plan, ModelSource(model), tmp_path / "out", CutOptions(verify=False))
    assert not report.padded
    assert report.applied.config["intermediate_size"].after == [block.n_kept for block in plan.blocks]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [layer.mlp.down_proj.in_features for layer in loaded.model.layers] == [block.n_kept for block in plan.blocks]
    restore(ModelSource(tmp_path / "out"), tmp_path / "back", CutOptions(verify=False))
    assert same(read(tmp_path / "back"), masked(model, plan))


def test_one_layer_alone_keeps_the_files_size(tmp_path: Path) -> None:
    model = saved("llama", "causal", tmp_path / "model")
    plan = planned(model, lambda number, ffn: ffn.width // 2 if number == 1 else ffn.width)
    with pytest.raises(UsageError, match=r"shrink by 0 of the [0-9,]+ parameters .* intermediate_size sets the width"):
        apply_plan(plan, ModelSource(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = apply_plan(plan, ModelSource(model), tmp_path / "out", CutOptions(allow_padding=True))
    assert report.bytes_after == report.bytes_before
    assert [block.layer_index for block in report.padded] == [1]
    assert zeros(report) == (
        "1 FFN padded with zeros: intermediate_size sets the width together with that of FFNs that keep more"
    )


@pytest.mark.parametrize("seed", [0, 1, *repeated(2, 3)])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "gpt_oss", "qwen2_moe"])
def test_any_counts(model_type: str, seed: int, tmp_path: Path) -> None:
    """Random counts from 1 to all of them, equal in all FFNs of a width or not, in shards of any size."""
    random = np.random.default_rng(seed)
    model = saved(model_type, "causal", tmp_path / "model")
    equal: dict[int, int] = {}

    def keep(number: int, ffn: Any) -> int:
        count = int(random.integers(1, ffn.width + 1))
        return count if seed % 2 else equal.setdefault(ffn.width, count)

    plan = planned(model, keep, seed)
    save_plan(plan, tmp_path / "plan.safetensors")
    again = load_plan(tmp_path / "plan.safetensors")
    report = apply_plan(
        again,
        ModelSource(model),
        tmp_path / "out",
        CutOptions(shard_bytes=int(random.integers(1000, 100_000)), allow_padding=True),
    )
    assert report.logits is not None
    kept, applied = load_applied(tmp_path / "out" / KEPT_FILE)
    assert applied == report.applied
    for first, second in zip(kept.blocks, plan.blocks, strict=True):
        assert np.array_equal(first.kept, second.kept)
        assert tuple(first.tensors) == tuple(second.tensors)
    restore(ModelSource(tmp_path / "out"), tmp_path / "back")
    assert same(read(tmp_path / "back"), masked(model, plan))


def test_a_fine_tune_is_cut_alike(tmp_path: Path) -> None:
    base = saved("llama", "causal", tmp_path / "base")
    plan = planned(base, lambda number, ffn: ffn.width // 2)
    zoo.tiny("llama", "causal", seed=9).save_pretrained(tmp_path / "tuned")
    with pytest.raises(ModelError, match="not the model of the atlas") as caught:
        apply_plan(plan, ModelSource(tmp_path / "tuned"), tmp_path / "out")
    assert "--fine-tune" in str(caught.value.hint)
    report = apply_plan(
        plan, ModelSource(tmp_path / "tuned", "me/tuned", "c0ffee", "hub"), tmp_path / "out", CutOptions(fine_tune=True)
    )
    assert report.applied.fingerprint != plan.model.fingerprint
    assert report.logits is not None
    assert "base_model: me/tuned\n" in (tmp_path / "out" / "README.md").read_text()
    restore(ModelSource(tmp_path / "out"), tmp_path / "back")
    assert same(read(tmp_path / "back"), masked(tmp_path / "tuned", plan))
    saved("gpt2", "causal", tmp_path / "other")
    with pytest.raises(ModelError, match="not a fine-tune of it"):
        apply_plan(plan, ModelSource(tmp_path / "other", "other", "", "local"), tmp_path / "out2", CutOptions(fine_tune=True))


def test_training_a_cut_model_and_restoring_it(tmp_path: Path) -> None:
    """The restored weights are those of the pruned model, even if it was trained since."""
    model = saved("gpt_oss", "causal", tmp_path / "model")
    plan = planned(model, lambda number, ffn: ffn.width // 2)
    apply_plan(plan, ModelSource(model), tmp_path / "out")
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1.0)
    trained.save_pretrained(tmp_path / "out")
    restore(ModelSource(tmp_path / "out"), tmp_path / "back")
    expected, found = masked(tmp_path / "back", plan), read(tmp_path / "back")
    assert same(found, expected), "a removed channel is not zero"
    assert found["model.norm.weight"].equal(read(model)["model.norm.weight"] + 1)


def test_what_was_not_cut_here_is_not_restored(tmp_path: Path) -> None:
    model = saved("llama", "causal", tmp_path / "model")
    with pytest.raises(UsageError, match="kept_channels"):
        restore(ModelSource(model), tmp_path / "back")
    plan = planned(model, lambda number, ffn: ffn.width // 2)
    apply_plan(plan, ModelSource(model), tmp_path / "out", CutOptions(verify=False))
    save_plan(plan, tmp_path / "out" / KEPT_FILE)
    with pytest.raises(UsageError, match="was not applied"):
        restore(ModelSource(tmp_path / "out"), tmp_path / "back")
    assert not (tmp_path / "back").exists()
