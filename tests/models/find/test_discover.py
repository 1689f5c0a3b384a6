"""Discovery on tiny random models of many architectures, and its refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chanfmt.base.errors import ModelError
from chanfmt.models.find import discover
from chanfmt.models.find.discover import find_ffns
from chanfmt.models.matrices import ffn_weights
from chanfmt.models.safetensors import CheckpointIndex
from chanfmt.models.stored.layout import tensor_slices
from tests.support.tiny import CONFIGS, save_tiny, tiny_model

LLAMA = CONFIGS["llama"]
OTHERS = {
    "mistral": (LLAMA, 87, True),
    "qwen2": (LLAMA, 87, True),
    "gemma": ({**LLAMA, "head_dim": 6}, 87, True),
    "gemma3_text": ({**LLAMA, "head_dim": 6}, 87, True),
    "stablelm": (LLAMA, 87, True),
    "starcoder2": (LLAMA, 87, False),
    "falcon": ({"hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 6, "ffn_hidden_size": 87}, 87, False),
    "bloom": ({"hidden_size": 36, "n_layer": 3, "n_head": 6}, 144, False),
    "gptj": ({"n_embd": 36, "n_layer": 3, "n_head": 6, "n_inner": 87, "rotary_dim": 4}, 87, False),
    "ctrl": ({"n_embd": 36, "dff": 87, "n_layer": 3, "n_head": 6}, 87, False),
    "modernbert-decoder": ({**LLAMA, "cls_token_id": 1, "sep_token_id": 2}, 87, True),
    "xglm": ({"d_model": 36, "ffn_dim": 87, "num_layers": 3, "attention_heads": 6}, 87, False),
    "biogpt": (CONFIGS["bert"], 87, False),
    "recurrent_gemma": ({**LLAMA, "num_key_value_heads": 1, "head_dim": 6}, 43, True),  # its config halves the width
}


@pytest.mark.parametrize("model_type", [*CONFIGS, *OTHERS])
def test_every_ffn_is_found(model_type):
    changes, width, gated = OTHERS.get(model_type, ({}, 87, model_type in ("llama", "phi3")))
    ffns = find_ffns(tiny_model(model_type, **changes))
    assert [ffn.layer_index for ffn in ffns] == [0, 1, 2]
    assert {ffn.width for ffn in ffns} == {width}
    assert {ffn.gated for ffn in ffns} == {gated}


def test_names_and_roles():
    llama = find_ffns(tiny_model("llama"))[1]
    assert llama.write == "model.layers.1.mlp.down_proj.weight"
    assert [(read.projection.matrix.parameter, read.role) for read in llama.members[0].reads] == [
        ("model.layers.1.mlp.gate_proj.weight", "gate"),
        ("model.layers.1.mlp.up_proj.weight", "up"),
    ]
    phi3 = find_ffns(tiny_model("phi3"))[0]
    assert [(read.role, read.start, read.step) for read in phi3.members[0].reads] == [("gate", 0, 1), ("up", 87, 1)]
    opt = find_ffns(tiny_model("opt"))[0]
    assert (opt.container, opt.write) == ("model.decoder.layers.0", "model.decoder.layers.0.fc2.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "opt"])
def test_any_dtype(model_type, dtype):
    assert len(find_ffns(tiny_model(model_type, dtype=dtype))) == 3


def test_whether_a_model_is_causal_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(discover, "is_causal", lambda model: asked.append(model) or True)
    model = tiny_model("llama")
    assert [ffn.place for ffn in find_ffns(model)] == ["decoder"] * 3
    assert asked == [model]


class InterleavedMLP(nn.Module):
    """A fused gate and up with alternating rows, as some checkpoints have it."""

    def __init__(self, hidden, width):
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width)
        self.down = nn.Linear(width, hidden)

    def forward(self, x):
        both = self.gate_up(x)
        return self.down(torch.nn.functional.silu(both[..., ::2]) * both[..., 1::2])


def test_interleaved_halves():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = InterleavedMLP(36, 87)
    ffns = find_ffns(model)
    assert len(ffns) == 3
    assert [(read.role, read.start, read.step) for read in ffns[0].members[0].reads] == [("gate", 0, 2), ("up", 1, 2)]
    rows = ffn_weights(model, ffns[0].members[0]).reads["up"]
    torch.testing.assert_close(rows, model.model.layers[0].mlp.gate_up.weight.detach()[1::2])


class NormedMLP(InterleavedMLP):
    """A normalisation between read and write: every channel depends on all others."""

    def forward(self, x):
        both = self.gate_up(x)
        u = torch.nn.functional.silu(both[..., :87]) * both[..., 87:]
        return self.down(u / u.square().mean(-1, keepdim=True).sqrt())


class LeakyMLP(InterleavedMLP):
    """Another input than the reads reaches the write."""

    def forward(self, x):
        both = self.gate_up(x)
        return self.down(torch.relu(both[..., :87]) + x.repeat(1, 1, 3)[..., :87])


class RolledMLP(InterleavedMLP):
    """Channel i of the read is channel i + 1 of the write, so the channels cannot be cut."""

    def forward(self, x):
        both = self.gate_up(x)
        return self.down(torch.relu(both[..., :87]).roll(1, -1) * both[..., 87:])


@pytest.mark.parametrize("mlp", [LeakyMLP, RolledMLP])
def test_what_is_not_elementwise_is_refused(mlp):
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = mlp(36, 87)
    with pytest.raises(ModelError, match="no FFN that can be measured"):
        find_ffns(model)


def test_attention_of_the_ffn_width_is_not_an_ffn():
    # Value and output projections keep channels apart as an FFN does, but they mix tokens.
    model = tiny_model("llama", intermediate_size=36, num_key_value_heads=6)
    ffns = find_ffns(model)
    assert [ffn.write for ffn in ffns] == [f"model.layers.{index}.mlp.down_proj.weight" for index in range(3)]


def test_a_layer_without_ffn_is_named():
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.gate_proj(x) * mlp.up_proj(x) + x.repeat(1, 1, 3)[..., :87])
    with pytest.raises(ModelError, match=r"model\.layers\.1 has no FFN"):
        find_ffns(model)


def test_a_norm_between_read_and_write_is_noted():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = NormedMLP(36, 87)
    assert [ffn.mixed for ffn in find_ffns(model)] == [True, True, True]
    assert [ffn.mixed for ffn in find_ffns(tiny_model("llama"))] == [False, False, False]


def test_an_ffn_that_every_layer_uses_is_one():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = model.model.layers[0].mlp
    ffns = find_ffns(model)
    assert [(ffn.container, ffn.uses) for ffn in ffns] == [("model.layers.0.mlp", 3)]


def test_models_without_ffn_are_refused():
    with pytest.raises(ModelError, match="no FFN"):
        find_ffns(tiny_model("mamba", hidden_size=36, num_hidden_layers=2))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_slices_point_at_the_weights(tmp_path, model_type):
    import safetensors.torch

    save_tiny(tmp_path, model_type)
    model = tiny_model(model_type)
    index = CheckpointIndex.open(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for ffn in find_ffns(model):
        weights = ffn_weights(model, ffn.members[0])
        for item in tensor_slices(model, ffn, index):
            if item.role == "write_bias":
                assert item.axis is None
                continue
            tensor = stored[item.tensor].transpose(0, item.axis)[item.start : item.stop : item.step]
            assert len(tensor) == ffn.width
            if item.role == "write":
                torch.testing.assert_close(tensor, weights.write.T)
            elif item.role in weights.reads:
                torch.testing.assert_close(tensor, weights.reads[item.role])


def test_a_checkpoint_of_the_base_model_is_mapped(tmp_path):
    # The Hub's gpt2 has no "transformer." in its tensor names.
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path)
    slices = tensor_slices(model, find_ffns(model)[0], CheckpointIndex.open(tmp_path))
    assert (slices[0].parameter, slices[0].tensor) == ("transformer.h.0.mlp.c_fc.weight", "h.0.mlp.c_fc.weight")


def test_other_values_under_the_same_name_are_refused(tmp_path):
    save_tiny(tmp_path, "llama", seed=1)
    model = tiny_model("llama", seed=2)
    with pytest.raises(ModelError, match="another name or in another form"):
        tensor_slices(model, find_ffns(model)[0], CheckpointIndex.open(tmp_path))
