"""The refit of the kept channels: the normal equations, the pass through the model, and the written weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import transformers

from chanfmt.models.run import run_text
from chanfmt.models.source import ModelSource
from chanfmt.models.streaming.streamed import open_streamed
from surgery.cut.apply import apply_plan
from surgery.cut.options import CutOptions
from surgery.recovery.least_squares import Moments, fit
from surgery.recovery.options import Refit
from surgery.recovery.survivors import Survivors
from tests.support import zoo
from tests.support.plans import planned, read
from tests.support.repeated import repeated

if TYPE_CHECKING:
    from pathlib import Path


def moments_of(u: torch.Tensor, y: torch.Tensor, a: torch.Tensor) -> Moments:
    moments = Moments(u.shape[1], y.shape[1], torch.device("cpu"))
    for part in torch.arange(len(u)).split(17):
        moments.add(u[part], y[part], a[part])
    return moments


def exact(u: np.ndarray, y: np.ndarray, a: np.ndarray, prior: np.ndarray, damping: float) -> np.ndarray:
    """The normal equations by Gaussian elimination in long double."""
    u, y, a, prior = (item.astype(np.longdouble) for item in (u, y, a, prior))
    h = (u * a[:, None]).T @ u
    penalty = damping * np.trace(h) / len(h)
    left = np.concatenate([h + penalty * np.eye(len(h), dtype=np.longdouble), (u * a[:, None]).T @ y + penalty * prior.T], axis=1)
    for pivot in range(len(h)):
        best = pivot + int(np.abs(left[pivot:, pivot]).argmax())
        left[[pivot, best]] = left[[best, pivot]]
        left[pivot] /= left[pivot, pivot]
        for row in range(len(h)):
            if row != pivot:
                left[row] -= left[row, pivot] * left[pivot]
    return left[:, len(h) :].T


@pytest.mark.parametrize("damping", [0.0, 1e-2, 1.0])
def test_it_solves_the_normal_equations(damping: float) -> None:
    random = np.random.default_rng(0)
    u, y = random.normal(size=(50, 6)) @ random.normal(size=(6, 6)), random.normal(size=(50, 4))
    a, prior = random.uniform(0.1, 2, 50), random.normal(size=(4, 6))
    found = fit(moments_of(*map(torch.from_numpy, (u, y, a))), torch.from_numpy(prior), damping)
    expected = exact(u, y, a, prior, damping)
    assert np.abs(found.weight.numpy() - expected).max() <= 1e-10 * np.abs(expected).max()
    left = [float((a[:, None] * (y - u @ weight.T) ** 2).sum() / (a[:, None] * y**2).sum()) for weight in (prior, expected)]
    assert [found.before, found.after] == pytest.approx(left, rel=1e-9)
    assert found.damping == damping
    h = (u * a[:, None]).T @ u
    h += damping * np.trace(h) / 6 * np.eye(6)
    # LAPACK estimates the norm of the inverse from below, as a rule exactly.
    assert 0.3 * np.linalg.cond(h, 1) <= found.condition <= 1.001 * np.linalg.cond(h, 1)


@pytest.mark.parametrize("case", ["deficient", "dead", "fewer tokens", "all zero", "perfect already", "no target"])
def test_it_never_makes_it_worse(case: str) -> None:
    random = np.random.default_rng(1)
    count = 3 if case == "fewer tokens" else 40
    u, y, prior = random.normal(size=(count, 8)), random.normal(size=(count, 5)), random.normal(size=(5, 8))
    if case == "deficient":
        u[:, 4:] = u[:, :4]
    if case == "dead":
        u[:, 3] = 0
    if case == "all zero":
        u[:] = 0
    if case == "perfect already":
        y = u @ prior.T
    if case == "no target":
        y[:] = 0
    moments = moments_of(torch.from_numpy(u), torch.from_numpy(y), torch.ones(count))
    for damping in (0.0, 1e-2):
        found = fit(moments, torch.from_numpy(prior), damping)
        assert bool(found.weight.isfinite().all())
        assert found.after <= found.before
        if case == "dead":
            assert torch.allclose(found.weight[:, 3], torch.from_numpy(prior[:, 3])), "nothing is known about a dead channel"
        if case in ("all zero", "no target"):
            assert torch.equal(found.weight, torch.from_numpy(prior))
        if case == "deficient" and damping == 0:
            assert found.damping > 0, "it could not be solved without a penalty"
        if case == "fewer tokens":
            assert found.after < 0.01


def recovery(tokens: int = 24, spool_bytes: int = 1 << 30) -> Refit:
    ids = np.random.default_rng(3).integers(0, 90, (tokens, 20)).astype(np.int32)
    return Refit(ids, "cpu", spool_bytes)


def distance(model: Path, cut: Path, ids: np.ndarray) -> float:
    """How far a cut model's last hidden states are from the dense model's, token by token relative to them."""
    states = []
    for directory in (model, cut):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.inference_mode():
            states.append(loaded(torch.from_numpy(ids).long(), output_hidden_states=True).hidden_states[-2])
    return float(((states[1] - states[0]).square().sum(-1) / states[0].square().sum(-1)).mean())


@pytest.mark.parametrize("model_type", ["gpt2", "phi3", "gemma3_text", *repeated("llama", "opt", "gptj", "olmo2")])
def test_a_refitted_model_is_closer_to_the_dense_one(model_type: str, tmp_path: Path) -> None:
    """The refit brings the hidden states nearer on the calibration tokens, changes no other weights, and is the same twice."""
    zoo.tiny(model_type, "causal").save_pretrained(tmp_path / "model")
    plan = planned(tmp_path / "model", lambda number, ffn: ffn.width // 2)
    given = recovery()
    apply_plan(plan, ModelSource(tmp_path / "model"), tmp_path / "plain")
    report = apply_plan(plan, ModelSource(tmp_path / "model"), tmp_path / "fitted", recovery=given)
    assert report.recovery is not None
    assert len(report.recovery.layers) == len(plan.blocks)
    assert all(layer.error_after < layer.error_before for layer in report.recovery.layers)
    assert report.recovery.logit_error < 1e-5
    assert distance(tmp_path / "model", tmp_path / "fitted", given.tokens) < distance(
        tmp_path / "model", tmp_path / "plain", given.tokens
    )
    writes = {item.tensor for block in plan.blocks for item in block.tensors if item.role in ("write", "write_bias")}
    plain, fitted = read(tmp_path / "plain"), read(tmp_path / "fitted")
    assert {name for name in plain if not torch.equal(plain[name], fitted[name])} == writes
    apply_plan(plan, ModelSource(tmp_path / "model"), tmp_path / "again", recovery=recovery(spool_bytes=0))
    again = read(tmp_path / "again")
    assert all(torch.equal(fitted[name], again[name]) for name in fitted)


def first_block(directory: Path, layer: str, write: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations, what the FFN writes, and the block's output, (token, feature) each."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    seen: dict[str, torch.Tensor] = {}
    model.get_submodule(write).register_forward_hook(lambda module, inputs, output: seen.update(u=inputs[0], y=output))
    model.get_submodule(layer).register_forward_hook(
        lambda module, inputs, output: seen.update(h=output[0] if isinstance(output, tuple) else output)
    )
    with torch.inference_mode():
        model(torch.from_numpy(ids).long())
    u, y, h = (seen[name].reshape(-1, seen[name].shape[-1]).double().numpy() for name in "uyh")
    return u, y, h


def test_the_first_block_is_the_least_squares_solution(tmp_path: Path) -> None:
    """Compare with a fit by hand: the input of the first FFN is the same in both models."""
    zoo.tiny("llama", "causal").save_pretrained(tmp_path / "model")
    plan = planned(tmp_path / "model", lambda number, ffn: ffn.width // 2)
    given = recovery()
    report = apply_plan(plan, ModelSource(tmp_path / "model"), tmp_path / "out", recovery=given)
    damping = report.recovery.layers[0].damping
    u, y, h = first_block(tmp_path / "model", "model.layers.0", "model.layers.0.mlp.down_proj", given.tokens)
    kept = plan.blocks[0].kept
    prior = read(tmp_path / "model")["model.layers.0.mlp.down_proj.weight"].double().numpy()[:, kept]
    expected = exact(u[:, kept], y, 1 / (h**2).mean(1), prior, damping)
    found = read(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"].double().numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_bias_is_fitted_too(tmp_path: Path) -> None:
    """Compare with a fit by hand, in which the bias is one more channel with a constant activation of average size."""
    zoo.tiny("gpt2", "causal").save_pretrained(tmp_path / "model")
    plan = planned(tmp_path / "model", lambda number, ffn: ffn.width // 2)
    given = recovery()
    report = apply_plan(plan, ModelSource(tmp_path / "model"), tmp_path / "out", recovery=given)
    damping = report.recovery.layers[0].damping
    name = "transformer.h.0.mlp.c_proj"
    u, y, h = first_block(tmp_path / "model", "transformer.h.0", name, given.tokens)
    before, after = (
        {key: value.double().numpy() for key, value in read(tmp_path / directory).items()} for directory in ("model", "out")
    )
    kept, bias = plan.blocks[0].kept, before[f"{name}.bias"]
    # The constant is measured on the fitted sequences: every eighth is held out.
    fitted = u.reshape(len(given.tokens), -1, u.shape[-1])[np.arange(len(given.tokens)) % 8 != 7]
    constant = np.sqrt((fitted[..., kept] ** 2).mean())
    inputs = np.concatenate([u[:, kept], np.full((len(u), 1), constant)], axis=1)
    prior = np.concatenate([before[f"{name}.weight"][kept].T, np.zeros((len(bias), 1))], axis=1)
    expected = exact(inputs, y - bias, 1 / (h**2).mean(1), prior, damping)
    assert np.abs(after[f"{name}.weight"].T - expected[:, :-1]).max() <= 1e-4 * np.abs(expected).max()
    shift = expected[:, -1] * constant
    assert np.abs(after[f"{name}.bias"] - bias - shift).max() <= 1e-4 * np.abs(shift).max()


def test_only_what_is_cut_is_refitted(tmp_path: Path) -> None:
    zoo.tiny("llama", "causal").save_pretrained(tmp_path / "model")
    plan = planned(tmp_path / "model", lambda number, ffn: ffn.width // 2 if number else ffn.width)
    options = CutOptions(allow_padding=True)
    report = apply_plan(plan, ModelSource(tmp_path / "model"), tmp_path / "out", options, recovery=recovery())
    assert report.recovery is not None
    assert [layer.layer_index for layer in report.recovery.layers] == [1]
    before, after = read(tmp_path / "model"), read(tmp_path / "out")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    }
    removed = torch.from_numpy(plan.blocks[1].removed_of(0)).long()
    assert bool((after["model.layers.1.mlp.up_proj.weight"] == 0).all(1).sum() == len(removed))


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "gptj"])
def test_only_what_stays_is_computed(model_type: str, tmp_path: Path) -> None:
    """If the model's code allows narrowing, the result is the same."""
    directory = tmp_path / "model"
    zoo.tiny(model_type, "causal").save_pretrained(directory)
    streamed = open_streamed(ModelSource(directory, "tiny"))
    ids = torch.from_numpy(recovery().tokens[:2]).long()
    hidden, calls = streamed.chain.calls(lambda: run_text(streamed.chain.model, ids))
    ffn = streamed.ffns[0]
    kept = np.array([1, 4, 5])
    with torch.no_grad(), streamed.chain.loaded(0):
        survivors = Survivors(streamed.chain, 0, ffn, kept)
        whole, without = survivors.run(calls[0], hidden)
        survivors.narrow(calls[0], hidden)
        narrowed, same = survivors.run(calls[0], hidden)
        assert torch.allclose(narrowed, whole, rtol=1e-5, atol=1e-7)
        assert torch.equal(without, same)
        rows = streamed.chain.model.get_parameter(ffn.members[0].reads[0].projection.matrix.parameter).shape
        # Conv1D stores its number of outputs, so its parameter stays whole.
        expected = {"llama": 3, "phi3": 6, "gptj": 3, "gpt2": ffn.width}[model_type]
        assert expected in rows
