"""Routed experts: the statistics of each expert come from its own tokens, against a computation that spells the layer out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from chanfmt.building.derive import layer_variables
from chanfmt.building.measure import measure
from chanfmt.data.tokens import canonical
from chanfmt.format.records import LabelSettings
from chanfmt.models.find.discover import find_ffns
from chanfmt.models.matrices import ffn_weights, matrix_of
from chanfmt.models.safetensors import CheckpointIndex
from chanfmt.models.stored.layout import tensor_slices
from tests.support.direct import assert_metrics_close, direct_sums
from tests.support.tiny import random_tokens, tiny_model
from tests.support.zoo import tiny

MIXTRAL = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "max_position_embeddings": 128,
}


def plain_experts(experts, seen):
    """Mixtral's expert layer written out, one expert after the other; keeps (token, u) of each."""

    def forward(hidden, chosen, weights):
        result = torch.zeros_like(hidden)
        for expert in range(experts.num_experts):
            token, slot = torch.where(chosen == expert)
            gate, up = (hidden[token] @ experts.gate_up_proj[expert].T).chunk(2, -1)
            u = functional.silu(gate) * up
            if not u.requires_grad:
                u = u.detach().requires_grad_(True)
            u.retain_grad()
            seen[expert].append(u)
            result = result.index_add(0, token, (u @ experts.down_proj[expert].T) * weights[token, slot, None])
        return result

    return forward


def test_each_expert_is_measured_on_its_own_tokens():
    model = tiny_model("mixtral", dtype=torch.float64, **MIXTRAL).requires_grad_(False)
    ffns = find_ffns(model)
    assert [(ffn.kind, ffn.experts, ffn.width) for ffn in ffns] == [("experts", 4, 44)] * 2
    tokens = canonical(random_tokens(9, 24).numpy())
    found = measure(model, ffns, tokens, rho=0.05, batch_size=2)
    seen = [[[] for _ in range(4)] for _ in ffns]
    for layer, kept in zip(model.model.layers, seen, strict=True):
        layer.mlp.experts.forward = plain_experts(layer.mlp.experts, kept)
    us, ss = [], []
    for row in torch.from_numpy(tokens.ids).long():
        logits = model(row[None], use_cache=False).logits
        functional.cross_entropy(logits[0, :-1], row[1:], reduction="sum").backward()
        us.append([[u[-1].detach().numpy() for u in kept] for kept in seen])
        ss.append([[u[-1].grad.numpy() for u in kept] for kept in seen])
    for layer, statistics in enumerate(found.statistics):
        assert sum(member.tokens for member in statistics.members) == 2 * tokens.ids.size
        for expert, member in enumerate(statistics.members):
            u, s = (np.concatenate([row[layer][expert] for row in rows]) for rows in (us, ss))
            assert member.tokens == len(u)
            for split in range(8):
                count = sum(len(us[i][layer][expert]) for i in np.flatnonzero(tokens.split_of == split))
                assert member.tokens_split[split] == count
            for name, value in direct_sums(u[None], s[None]).items():
                scale = np.abs(u * s).sum() if name in ("sum_u", "sum_q") else None
                if scale is None:
                    assert_metrics_close(member.sums[name].numpy(), value, 1e-9)
                else:
                    np.testing.assert_allclose(member.sums[name].numpy(), value, atol=1e-9 * max(1, scale))


def test_an_expert_without_tokens_has_sums_of_zero_and_no_metrics():
    model = tiny_model("mixtral", **MIXTRAL, num_experts_per_tok=1).requires_grad_(False)
    with torch.no_grad():
        # An expert whose score lies halfway between the scores of two others is never the first.
        gate = model.model.layers[1].mlp.gate.weight
        gate[1:] = gate[0] * torch.tensor([-1.0, 0.0, 0.5])[:, None]
    ffns = find_ffns(model)
    found = measure(model, ffns, canonical(random_tokens(9, 24).numpy()), rho=0.05)
    unused = found.statistics[1].members[3]
    assert unused.tokens == 0
    assert not any(values.any() for values in unused.sums.values())
    weights = [ffn_weights(model, member) for member in ffns[1].members]
    variables, _ = layer_variables(found.statistics[1], weights, LabelSettings(rho=0.05), None)
    assert np.isnan(variables["lp"][3]).all()
    assert not variables["label"][3].any()
    assert (variables["protection"][3] == 1).all()
    assert np.isfinite(variables["lp"][:2]).all()


# Experts as halves, interleaved with biases, applied to all tokens at once, transposed, in ragged batches, beside dense FFNs.
@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss", "llama4_text", "aria_text", "jetmoe", "deepseek_v3", "dbrx"])
def test_slices_of_every_expert_point_at_its_weights(tmp_path, model_type):
    import safetensors.torch
    import transformers

    tiny(model_type).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval().requires_grad_(False)
    index = CheckpointIndex.open(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for ffn in find_ffns(model):
        slices = iter(tensor_slices(model, ffn, index))
        for member in ffn.members:
            weights = ffn_weights(model, member)
            for item in slices:
                if item.role.endswith("_bias"):
                    if item.role == "write_bias":
                        break
                    continue
                tensor = stored[item.tensor] if item.index is None else stored[item.tensor][item.index]
                axis = item.axis - (item.index is not None)
                rows = tensor.transpose(0, axis)[item.start : item.stop : item.step]
                expected = weights.write.T if item.role == "write" else weights.reads[item.role]
                torch.testing.assert_close(rows, expected)
                if item.role == "write" and member.write.bias is None:
                    break
        assert next(slices, None) is None
        assert matrix_of(model, ffn.members[-1].write.matrix).shape == (ffn.outputs, ffn.width)
