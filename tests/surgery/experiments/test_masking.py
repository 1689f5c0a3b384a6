"""Channels removed in place: masks compute the same as zeroed weights, means the same as a hand computation, and nothing stays."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from chanfmt.models.find.discover import find_ffns
from chanfmt.models.matrices import matrix_of
from chanfmt.models.run import run_text
from surgery.cut.matching import match_ffns
from surgery.experiments.masking import masked
from tests.support.tiny import random_tokens, tiny_model
from tests.support.zoo import tiny

if TYPE_CHECKING:
    from chanfmt.models.ffn import FFN

TYPES = ("llama", "gpt2", "phi3", "opt", "qwen2_moe", "mixtral", "gpt_oss", "llama4_text", "granitemoe", "dbrx", "jamba")
"""Linear and Conv1D, separate and fused reads, experts in lists, fused, batched and as runs of rows, shared experts."""


def fingerprint(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def random_masks(ffns: list[FFN], seed: int = 0) -> dict[int, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        number: random.random((ffn.experts, ffn.width) if ffn.experts else ffn.width) < 0.4 for number, ffn in enumerate(ffns)
    }


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return run_text(model, ids).logits


@torch.no_grad()
def zero_weights(model: Any, ffns: list[FFN], removed: dict[int, np.ndarray]) -> None:
    for number, mask in removed.items():
        for member, row in zip(ffns[number].members, np.atleast_2d(mask), strict=True):
            matrix_of(model, member.write.matrix)[:, torch.from_numpy(row)] = 0.0


@pytest.mark.parametrize("model_type", TYPES)
def test_masks_are_zeroed_weights(model_type: str) -> None:
    model, ids = tiny(model_type), random_tokens(2, 24)
    ffns = find_ffns(model)
    removed = random_masks(ffns)
    before, dense = fingerprint(model), logits(model, ids)
    with masked(model, dict(enumerate(ffns)), removed):
        found = logits(model, ids)
    assert fingerprint(model) == before
    assert torch.equal(logits(model, ids), dense)
    zero_weights(model, ffns, removed)
    assert fingerprint(model) != before
    expected = logits(model, ids)
    assert float((expected - dense).abs().max()) > 1e-2 * float(dense.abs().max())
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_one_channel_of_one_ffn_goes(model_type: str) -> None:
    model, ids = tiny(model_type), random_tokens(2, 24)
    ffns = find_ffns(model)
    removed = {1: np.zeros_like(random_masks(ffns)[1])}
    np.atleast_2d(removed[1])[-1, 5] = True
    dense = logits(model, ids)
    with masked(model, dict(enumerate(ffns)), removed):
        found = logits(model, ids)
    zero_weights(model, ffns, removed)
    expected = logits(model, ids)
    assert not torch.equal(expected, dense)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_nothing_stays_after_an_error() -> None:
    model, ids = tiny("mixtral"), random_tokens(2, 24)
    ffns = find_ffns(model)
    implementation = model.config._experts_implementation
    before, dense = fingerprint(model), logits(model, ids)
    seen = []

    def stopped() -> None:
        with masked(model, dict(enumerate(ffns)), random_masks(ffns)):
            seen.append(logits(model, ids))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not torch.equal(seen[0], dense)
    assert fingerprint(model) == before
    assert torch.equal(logits(model, ids), dense)
    assert model.config._experts_implementation == implementation


def test_fused_kernels_of_experts_do_not_pass_masks_by() -> None:
    model, ids = tiny("mixtral"), random_tokens(2, 24)
    model.config._experts_implementation = "grouped_mm"
    ffns = find_ffns(model)
    with torch.no_grad(), masked(model, dict(enumerate(ffns)), random_masks(ffns)):
        plain = model(input_ids=ids).logits
    assert model.config._experts_implementation == "grouped_mm"
    zero_weights(model, ffns, random_masks(ffns))
    torch.testing.assert_close(plain, logits(model, ids), rtol=1e-4, atol=1e-5)


def test_gradients_pass_through() -> None:
    model = tiny_model("llama").requires_grad_(False)
    ffns = find_ffns(model)
    weight = ffns[0].write
    model.get_parameter(weight).requires_grad_(True)
    removed = random_masks(ffns)
    with masked(model, dict(enumerate(ffns)), removed):
        run_text(model, random_tokens(1, 8)).logits.square().sum().backward()
    gradient = model.get_parameter(weight).grad
    assert gradient is not None
    assert torch.equal(gradient.abs().sum(dim=0) == 0, torch.from_numpy(removed[0]))


def test_means_stand_in_for_activations() -> None:
    model, ids = tiny_model("llama", dtype=torch.float64), random_tokens(2, 24)
    ffns = find_ffns(model)
    random = np.random.default_rng(3)
    removed = {1: random.random(87) < 0.4}
    means = {1: random.normal(0, 1, 87)}
    mlp = model.model.layers[1].mlp

    def by_hand(hidden: torch.Tensor) -> torch.Tensor:
        u = functional.silu(hidden @ mlp.gate_proj.weight.T) * (hidden @ mlp.up_proj.weight.T)
        for channel in np.flatnonzero(removed[1]):
            u[..., channel] = means[1][channel]
        return u @ mlp.down_proj.weight.T

    with masked(model, dict(enumerate(ffns)), removed, means):
        found = logits(model, ids)
    with masked(model, dict(enumerate(ffns)), removed):
        zeroed = logits(model, ids)
    mlp.forward = by_hand
    torch.testing.assert_close(found, logits(model, ids), rtol=1e-9, atol=1e-9)
    assert float((found - zeroed).abs().max()) > 1e-2


def test_experts_have_means_of_their_own() -> None:
    model, ids = tiny("mixtral"), random_tokens(2, 24)
    ffns = find_ffns(model)
    removed = {0: np.ones((4, 44), dtype=bool)}
    means = {0: np.random.default_rng(0).normal(0, 1, (4, 44))}
    experts = model.model.layers[0].mlp.experts
    seen = []

    def by_hand(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        # With all channels at their means an expert gives one vector, whatever the token.
        vectors = torch.stack(
            [matrix.float() @ torch.from_numpy(mean).float() for matrix, mean in zip(experts.down_proj, means[0], strict=True)]
        )
        seen.append(len(chosen.unique()))
        return (vectors[chosen] * weights[..., None]).sum(dim=1)

    with masked(model, dict(enumerate(ffns)), removed, means):
        found = logits(model, ids)
    experts.forward = by_hand
    torch.testing.assert_close(found, logits(model, ids), rtol=1e-4, atol=1e-5)
    assert seen == [4]


def test_ffns_match_by_module_width_and_experts() -> None:
    ffns = find_ffns(tiny("qwen2_moe"))

    class Like:
        def __init__(self, ffn: FFN, more: int = 0) -> None:
            self.module, self.n_channels, self.n_experts = ffn.container, ffn.width + more, ffn.experts

    assert match_ffns([Like(ffn) for ffn in reversed(ffns)], ffns) == ffns[::-1]
    assert match_ffns([Like(ffns[0], 1), Like(ffns[0]), Like(ffns[0])], ffns) == [None, ffns[0], None]
    twice = [ffns[0], ffns[0]]
    assert match_ffns([Like(ffns[0]), Like(ffns[0])], twice) == twice
