"""Refits of text that is hard to fit on: a few tokens, channels that are always 0, and activations that overflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from chanfmt.base.errors import ModelError
from chanfmt.models.run import test_tokens as opening_tokens
from chanfmt.models.source import ModelSource
from surgery.cut.apply import apply_plan
from surgery.cut.options import CutOptions
from surgery.recovery.options import Refit
from tests.support import zoo
from tests.support.plans import planned, read
from tests.support.repeated import repeated

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.result.record import Report


def refit(ids: np.ndarray, method: str) -> Refit:
    return Refit(ids.astype(np.int32), "cpu", 1 << 30, method)


def some_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(5, 90, shape)


def cut(directory: Path, output: str, given: Refit | None) -> Report:
    plan = planned(directory / "model", lambda number, ffn: ffn.width // 2)
    return apply_plan(plan, ModelSource(directory / "model"), directory / output, CutOptions(verify=False), recovery=given)


@pytest.mark.parametrize("method", ["lstsq", "block"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 3)])
@pytest.mark.parametrize("model_type", ["llama", "olmo2", *repeated("gpt2")])
def test_fewer_tokens_than_channels_give_a_fit_of_these_tokens(
    model_type: str, shape: tuple[int, int], method: str, tmp_path: Path
) -> None:
    """The write vectors move in as many directions as there are tokens, at most, and no further than the penalty allows."""
    zoo.tiny(model_type, "causal").save_pretrained(tmp_path / "model")
    report = cut(tmp_path, "out", refit(some_ids(*shape), method))
    cut(tmp_path, "plain", None)
    plain, fitted = read(tmp_path / "plain"), read(tmp_path / "out")
    assert report.recovery is not None
    assert report.recovery.logit_error < 1e-5
    assert all(bool(values.isfinite().all()) for values in fitted.values())
    tokens = int(np.prod(shape))
    for layer, block in zip(report.recovery.layers, report.plan.blocks, strict=True):
        assert layer.error_after < layer.error_before
        if method == "block" and shape[0] > 1:
            assert layer.held_out <= layer.held_out_lstsq
            continue
        write = next(item.tensor for item in block.tensors if item.role == "write")
        change = (fitted[write].double() - plain[write].double()).numpy()
        assert 0 < np.linalg.matrix_rank(change, tol=1e-3 * np.linalg.norm(change, 2)) <= tokens


@pytest.mark.parametrize("method", ["lstsq", "block"])
def test_dead_channels_keep_their_weights_and_change_no_others(method: str, tmp_path: Path) -> None:
    """Nothing is known about a channel that is always 0. The others get the weights that they get without it."""
    model = zoo.tiny("llama", "causal")
    plan_of = {}
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[:4] = 0
    model.save_pretrained(tmp_path / "model")
    report = cut(tmp_path, "out", refit(some_ids(24, 20), method))
    before, after = read(tmp_path / "model"), read(tmp_path / "out")
    for number, block in enumerate(report.plan.blocks):
        name = f"model.layers.{number}.mlp.down_proj.weight"
        dead = block.kept < 4
        assert bool(after[name].isfinite().all())
        same = torch.isclose(before[name][:, block.kept], after[name], rtol=1e-6, atol=1e-8).all(0).numpy()
        if method == "lstsq":
            assert (same == dead).all()
        plan_of[number] = dead.any()
    assert any(plan_of.values())


def overflowing(model: Any, reads: list[torch.Tensor], directory: Path) -> int:
    """Save ``model`` such that the activation of channel 5 in its first layer is infinite on a token. Returns the token's id."""
    token = next(number for number in range(50, 90) if number not in opening_tokens(model))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[token] = 0
        model.model.embed_tokens.weight[token, 0] = 10
        model.model.layers[0].self_attn.o_proj.weight[0] = 0
        for matrix in reads:
            matrix[..., 5, 0] = 1e20
    model.save_pretrained(directory / "model")
    return token


@pytest.mark.parametrize("method", ["lstsq", "block"])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize("sequence", [0, 9])
def test_activations_that_overflow_are_an_error_that_names_the_ffn(
    sequence: int, model_type: str, method: str, tmp_path: Path
) -> None:
    model = zoo.tiny(model_type, "causal")
    mlp = model.model.layers[0].mlp
    if model_type == "llama":
        reads = [mlp.gate_proj.weight, mlp.up_proj.weight]
    else:
        both = mlp.experts.gate_up_proj
        reads = [both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]]
    token = overflowing(model, [matrix.data for matrix in reads], tmp_path)
    ids = some_ids(24, 20)
    ids[ids == token] = token + 1
    cut(tmp_path, "fine", refit(ids, method))
    ids[sequence, 3] = token
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp.* has NaN or inf among its activations on the text"):
        cut(tmp_path, "out", refit(ids, method))
    assert not (tmp_path / "out").exists()
