"""Routed experts: the joint normal equations, every layout, experts with few tokens or none, and the written weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers

from chanfmt.base.errors import CheckError
from chanfmt.models.source import ModelSource
from surgery.cut.apply import apply_plan
from surgery.cut.check import check_fitted
from surgery.cut.options import CutOptions
from surgery.recovery.options import Refit
from surgery.recovery.refit import Refitted
from surgery.result.result import open_result
from tests.support import zoo
from tests.support.plans import planned, read
from tests.support.repeated import repeated

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.result.record import Report

GEMMA4 = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 28}
LAYOUTS = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "gpt_oss": {},
    "llama4_text": {},
    "dbrx": {},
    "jetmoe": {},
    "granitemoeshared": {},
    "gemma4_text": GEMMA4,
}
"""Fused and transposed parameters, interleaved roles, biases, batched products, shared experts with a gate, and a norm behind."""
ALIKE = ("qwen3_moe", "olmoe", "deepseek_v2")
"""Layouts that another type has too."""


def refit(sequences: int = 24, length: int = 20, spool_bytes: int = 1 << 30, method: str = "lstsq") -> Refit:
    ids = np.random.default_rng(3).integers(0, 90, (sequences, length)).astype(np.int32)
    return Refit(ids, "cpu", spool_bytes, method)


def saved(directory: Path, model_type: str, **changes: Any) -> Any:
    model = zoo.tiny(model_type, "causal", **changes)
    model.save_pretrained(directory / "model")
    return model


def cut(directory: Path, output: str, given: Refit | None) -> Report:
    plan = planned(directory / "model", lambda number, ffn: ffn.width // 2)
    # The logits of a fit are compared with those of stock code in any case.
    return apply_plan(plan, ModelSource(directory / "model"), directory / output, CutOptions(verify=False), recovery=given)


@pytest.mark.parametrize("model_type", [*(name for name in LAYOUTS if name not in ALIKE), *repeated(*ALIKE)])
def test_every_layout_is_refitted(model_type: str, tmp_path: Path) -> None:
    """Errors fall, stock code computes what was fitted, no other weight changes, and two runs give the same bits."""
    saved(tmp_path, model_type, **LAYOUTS[model_type])
    report = cut(tmp_path, "out", refit())
    assert report.recovery is not None
    assert report.recovery.logit_error < 1e-5
    assert len(report.recovery.layers) == len(report.plan.blocks)
    for layer in report.recovery.layers:
        assert layer.error_after < layer.error_before
    experts = [layer for layer in report.recovery.layers if layer.expert_tokens]
    assert [layer.module for layer in experts] == [block.module for block in report.plan.blocks if block.n_experts]
    cut(tmp_path, "plain", None)
    plain, fitted = read(tmp_path / "plain"), read(tmp_path / "out")
    writes = {item.tensor for block in report.plan.blocks for item in block.tensors if item.role in ("write", "write_bias")}
    changed = {name for name in plain if not torch.equal(plain[name], fitted[name])}
    assert changed <= writes
    reached = {
        item.tensor
        for layer, block in zip(report.recovery.layers, report.plan.blocks, strict=True)
        for number, item in enumerate(item for item in block.tensors if item.role == "write")
        if not block.n_experts or layer.expert_tokens[number]
    }
    assert reached <= changed
    cut(tmp_path, "again", refit(spool_bytes=0))
    again = read(tmp_path / "again")
    assert all(torch.equal(fitted[name], again[name]) for name in fitted)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "gemma4_text", *repeated("qwen2_moe", "llama4_text", "dbrx")])
def test_block_is_never_worse_than_least_squares_on_what_was_held_out(model_type: str, tmp_path: Path) -> None:
    saved(tmp_path, model_type, **LAYOUTS[model_type])
    report = cut(tmp_path, "out", refit(40, method="block"))
    assert report.recovery is not None
    assert report.recovery.logit_error < 1e-5
    for layer in report.recovery.layers:
        assert layer.held_out <= layer.held_out_lstsq
        assert layer.error_after < layer.error_before
    assert any(layer.epoch for layer in report.recovery.layers)
    cut(tmp_path, "plain", None)
    plain, fitted = read(tmp_path / "plain"), read(tmp_path / "out")
    changed = {name for name in plain if not torch.equal(plain[name], fitted[name])}
    assert changed <= {item.tensor for block in report.plan.blocks for item in block.tensors}
    adapted = {
        item.tensor
        for layer, block in zip(report.recovery.layers, report.plan.blocks, strict=True)
        for item in block.tensors
        if layer.epoch and item.role in ("gate", "up") and not layer.few_tokens
    }
    assert adapted
    assert adapted <= changed
    cut(tmp_path, "again", refit(40, spool_bytes=0, method="block"))
    again = read(tmp_path / "again")
    assert all(torch.equal(fitted[name], again[name]) for name in fitted)


def first_layer(
    directory: Path, ids: np.ndarray
) -> tuple[dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]], np.ndarray, np.ndarray]:
    """What the first layer of a Mixtral does: for each expert its tokens, weights and activations; the sum; the block's output."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    layer = model.model.layers[0]
    seen: dict[str, torch.Tensor] = {}
    layer.mlp.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], y=output))
    layer.register_forward_hook(lambda module, inputs, output: seen.update(h=output[0] if isinstance(output, tuple) else output))
    with torch.inference_mode():
        model(torch.from_numpy(ids).long())
        x, y, h = (seen[name].reshape(-1, seen[name].shape[-1]) for name in "xyh")
        chances = torch.softmax((x @ layer.mlp.gate.weight.T).float(), -1)
        best, chosen = chances.topk(model.config.num_experts_per_tok, -1)
        gains = best / best.sum(-1, keepdim=True)
        experts = {}
        for expert, both in enumerate(layer.mlp.experts.gate_up_proj):
            token, rank = torch.where(chosen == expert)
            gate, up = (x[token] @ both.T).chunk(2, -1)
            experts[expert] = tuple(
                item.double().numpy() for item in (token, gains[token, rank], torch.nn.functional.silu(gate) * up)
            )
    return experts, y.double().numpy(), h.double().numpy()


@pytest.mark.parametrize("chosen", [1, 2])
def test_the_first_layer_solves_the_normal_equations_of_all_experts_together(chosen: int, tmp_path: Path) -> None:
    """Compare with a solution by hand, in which the weighted activations of all experts are the columns of one matrix."""
    saved(tmp_path, "mixtral", num_experts_per_tok=chosen)
    given = refit(48)
    report = cut(tmp_path, "out", given)
    experts, y, h = first_layer(tmp_path / "model", given.tokens)
    block, layer = report.plan.blocks[0], report.recovery.layers[0]
    before, after = (
        [
            read(tmp_path / name)[f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"].double().numpy()
            for expert in experts
        ]
        for name in ("model", "out")
    )
    width = block.n_kept
    inputs = np.zeros((len(y), width * len(experts)))
    prior = np.concatenate([before[expert][:, block.kept[expert]] for expert in experts], axis=1)
    for expert, (token, gain, activations) in experts.items():
        inputs[token.astype(int), expert * width : (expert + 1) * width] = gain[:, None] * activations[:, block.kept[expert]]
    weights = 1 / (h**2).mean(1)
    second = (inputs * weights[:, None]).T @ inputs
    damped = second + layer.damping * np.trace(second) / len(second) * np.eye(len(second))
    step = np.linalg.solve(damped, (inputs * weights[:, None]).T @ (y - inputs @ prior.T))
    found = np.concatenate([after[expert] for expert in experts], axis=1)
    assert np.abs(found - prior - step.T).max() <= 1e-3 * np.abs(step).max()
    assert list(layer.expert_tokens) == [len(token) for token, _, _ in experts.values()]
    left = [
        float((weights[:, None] * (y - inputs @ wide.T) ** 2).sum() / (weights[:, None] * y**2).sum()) for wide in (prior, found)
    ]
    assert [layer.error_before, layer.error_after] == pytest.approx(left, rel=1e-4)


def test_an_expert_without_tokens_keeps_its_weights_and_one_with_few_stays_close(tmp_path: Path) -> None:
    model = zoo.tiny("gpt_oss", "causal")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.bias[3] = -1e4
            layer.mlp.router.bias[2] -= 2.0
    model.save_pretrained(tmp_path / "model")
    for method in ("lstsq", "block"):
        report = cut(tmp_path, method, refit(method=method))
        cut(tmp_path, f"{method}-plain", None)
        plain, fitted = read(tmp_path / f"{method}-plain"), read(tmp_path / method)
        for number, layer in enumerate(report.recovery.layers):
            width = report.plan.blocks[number].n_kept
            assert layer.expert_tokens[3] == 0
            assert layer.few_tokens == tuple(np.flatnonzero(np.array(layer.expert_tokens) < width))
            assert 3 in layer.few_tokens
            name = f"model.layers.{number}.mlp.experts"
            for part in ("down_proj", "down_proj_bias", "gate_up_proj", "gate_up_proj_bias"):
                assert torch.equal(plain[f"{name}.{part}"][3], fitted[f"{name}.{part}"][3])
            moved = (plain[f"{name}.down_proj"] - fitted[f"{name}.down_proj"]).square().sum((1, 2))
            assert 0 < moved[2] < moved[:2].min()
        summary = report.recovery.summary()
        few = sum(len(layer.few_tokens) for layer in report.recovery.layers)
        assert f"{few} of 8 experts were reached by fewer tokens than they have channels" in summary
        stored = json.loads((tmp_path / method / "surgery.json").read_text())["recovery"]["layers"]
        assert [layer["few_tokens"] for layer in stored] == [list(layer.few_tokens) for layer in report.recovery.layers]
        assert open_result(tmp_path / method).report.recovery.layers == list(report.recovery.layers)


@pytest.mark.parametrize("method", ["lstsq", "block"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (2, 3)])
def test_hardly_any_tokens_change_hardly_anything(shape: tuple[int, int], method: str, tmp_path: Path) -> None:
    """A single token moves an expert by at most a quarter of what it asks for, in its own direction, and nothing is NaN."""
    saved(tmp_path, "mixtral")
    report = cut(tmp_path, "out", refit(*shape, method=method))
    cut(tmp_path, "plain", None)
    plain, fitted = read(tmp_path / "plain"), read(tmp_path / "out")
    assert all(bool(values.isfinite().all()) for values in fitted.values())
    for layer in report.recovery.layers:
        assert sum(layer.expert_tokens) == 2 * int(np.prod(shape) if shape[0] == 1 or method == "lstsq" else shape[1])
        assert layer.error_after <= layer.error_before
        for expert, tokens in enumerate(layer.expert_tokens):
            name = f"model.layers.{layer.layer_index}.block_sparse_moe.experts.{expert}.w2.weight"
            change = fitted[name].double() - plain[name].double()
            assert torch.linalg.matrix_rank(change, rtol=1e-3) <= tokens
            assert change.norm() < plain[name].norm()


def test_dead_channels_of_an_expert_keep_their_weights(tmp_path: Path) -> None:
    model = zoo.tiny("mixtral", "causal")
    for layer in model.model.layers:
        layer.mlp.experts.gate_up_proj.data[:, 0] = 0
    model.save_pretrained(tmp_path / "model")
    report = cut(tmp_path, "out", refit())
    before, after = read(tmp_path / "model"), read(tmp_path / "out")
    kept = 0
    for number, block in enumerate(report.plan.blocks):
        for expert in range(block.n_experts):
            ids = block.kept[expert]
            kept += 0 in ids
            name = f"model.layers.{number}.block_sparse_moe.experts.{expert}.w2.weight"
            same = torch.isclose(before[name][:, ids], after[name], rtol=1e-6, atol=0).all(0)
            assert same.tolist() == [channel == 0 for channel in ids]
    assert kept


def test_one_token_that_a_router_sends_elsewhere_is_not_a_fault_of_the_file(tmp_path: Path) -> None:
    """Rounding decides between two experts of almost the same chance. In a dense model, no token may differ."""
    model = saved(tmp_path, "mixtral")
    ids = torch.from_numpy(refit(1).tokens).long()
    with torch.inference_mode():
        logits = model(ids).logits[0]
    source = ModelSource(tmp_path / "model")

    def check(tokens: int, routed: bool) -> float:
        wrong = logits.clone()
        wrong[:tokens] += logits.abs().max()
        return check_fitted(source, Refitted((), wrong, ids, lambda name: None), routed=routed)

    assert check(1, True) < 1e-5
    with pytest.raises(CheckError, match="differ from those at the end of the refit"):
        check(1, False)
    with pytest.raises(CheckError, match="differ from those at the end of the refit"):
        check(15, True)
