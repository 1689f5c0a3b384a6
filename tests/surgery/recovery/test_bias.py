"""The mean output of the removed channels becomes a bias: the model's own bias, or a bias that its config switches on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import transformers

from chanfmt.base.errors import ModelError
from chanfmt.models.find.discover import find_ffns
from chanfmt.models.find.intercept import Interceptor
from chanfmt.models.source import ModelSource
from surgery.cut.apply import apply_plan
from surgery.cut.options import CutOptions
from surgery.cut.restore import restore
from surgery.recovery.bias import SWITCHED
from surgery.recovery.options import BiasRecovery
from tests.support import zoo
from tests.support.plans import planned, read
from tests.support.repeated import repeated

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.planning.plan import PruningPlan

IDS = torch.from_numpy(np.random.default_rng(3).integers(0, 90, (8, 20)))


def first_ffn(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean activations of the first FFN's channels, and the mean of what it writes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    seen: list[torch.Tensor] = []
    interceptor = Interceptor(model)
    interceptor.on(find_ffns(model)[0].members[0].write.matrix, before=seen.append, after=seen.append)
    with torch.no_grad(), interceptor:
        model(IDS)
    activations, written = (tensor.reshape(-1, tensor.shape[-1]).mean(0).numpy() for tensor in seen)
    return activations, written


def recovery(plan: PruningPlan, directory: Path) -> BiasRecovery:
    activations, _ = first_ffn(directory)
    return BiasRecovery(dict.fromkeys((block.name for block in plan.blocks), activations), IDS.numel())


@pytest.mark.parametrize("model_type", ["llama", "opt", "granite", *repeated("gpt2", "phi", "nemotron")])
def test_the_mean_output_stays(model_type: str, tmp_path: Path) -> None:
    """Check the first FFN, whose input is the same in both models."""
    zoo.tiny(model_type, "causal").save_pretrained(tmp_path / "model")
    plan = planned(tmp_path / "model", lambda number, ffn: ffn.width // 2)
    apply_plan(plan, ModelSource(tmp_path / "model"), tmp_path / "plain")
    report = apply_plan(plan, ModelSource(tmp_path / "model"), tmp_path / "out", recovery=recovery(plan, tmp_path / "model"))
    (_, dense), (_, plain), (_, found) = (first_ffn(tmp_path / name) for name in ("model", "plain", "out"))
    scale = np.abs(dense).max()
    assert np.abs(found - dense).max() <= 1e-5 * scale
    assert np.abs(plain - dense).max() > 1e-2 * scale
    assert report.recovery is not None
    assert report.recovery.logit_error is not None
    assert report.recovery.logit_error < 1e-4
    summary = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert summary["recovery"]["method"] == "bias"


def test_a_bias_that_was_switched_on_survives_restoring(tmp_path: Path) -> None:
    zoo.tiny("llama", "causal").save_pretrained(tmp_path / "model")
    plan = planned(tmp_path / "model", lambda number, ffn: ffn.width // 2 if number else ffn.width)
    report = apply_plan(
        plan,
        ModelSource(tmp_path / "model"),
        tmp_path / "out",
        CutOptions(allow_padding=True),
        recovery=recovery(plan, tmp_path / "model"),
    )
    assert report.config_fields["mlp_bias"].after is True
    assert "`mlp_bias` is True" in (tmp_path / "out" / "README.md").read_text()
    restore(ModelSource(tmp_path / "out"), tmp_path / "wide")
    pruned, wide, dense = (read(tmp_path / name) for name in ("out", "wide", "model"))
    name = "model.layers.1.mlp.down_proj.bias"
    assert torch.equal(wide[name], pruned[name])
    assert bool(pruned[name].any())
    assert not bool(pruned["model.layers.0.mlp.down_proj.bias"].any()), "nothing was removed there"
    assert wide["model.layers.1.mlp.up_proj.bias"].shape == dense["model.layers.1.mlp.up_proj.weight"].shape[:1]


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
def test_without_a_switch_it_is_refused(model_type: str, tmp_path: Path) -> None:
    zoo.tiny(model_type, "causal").save_pretrained(tmp_path / "model")
    plan = planned(tmp_path / "model", lambda number, ffn: ffn.width // 2)
    given = BiasRecovery({block.name: np.zeros(block.n_channels) for block in plan.blocks}, 1)
    with pytest.raises(ModelError, match="no field of its config") as caught:
        apply_plan(plan, ModelSource(tmp_path / "model"), tmp_path / "out", recovery=given)
    assert "llama" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", SWITCHED)
def test_the_types_it_names_have_one(model_type: str) -> None:
    assert transformers.CONFIG_MAPPING[model_type]().mlp_bias is False
