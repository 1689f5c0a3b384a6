"""Every reader of checkpoints reads the result: safetensors, accelerate, GGUF converters."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from chanfmt.models.source import ModelSource
from surgery.cut.apply import apply_plan
from surgery.cut.options import CutOptions
from tests.support import zoo
from tests.support.plans import planned

if TYPE_CHECKING:
    from pathlib import Path

WIDTH = 96
KEPT = 64
"""A multiple of 32, the block of GGUF's quantised types."""


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that lost a third of every FFN, in three shards or more."""
    directory = tmp_path_factory.mktemp("formats")
    config = zoo.tiny_config("llama")
    config.intermediate_size = WIDTH
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(config).save_pretrained(directory / "model")
    plan = planned(directory / "model", lambda number, ffn: KEPT)
    apply_plan(plan, ModelSource(directory / "model"), directory / "out", CutOptions(shard_bytes=20_000))
    assert len(list((directory / "out").glob("model-*.safetensors"))) > 2
    return directory / "out"


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        return model.eval()(ids).logits


def test_safetensors_alone_reads_it(cut: Path) -> None:
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(cut).state_dict()
    seen = 0
    for name, file in index["weight_map"].items():
        with safe_open(cut / file, framework="pt") as shard:
            assert shard.metadata()["format"] == "pt"
            tensor = shard.get_tensor(name)
        assert torch.equal(tensor, model[name])
        seen += tensor.nbytes
    assert index["metadata"]["total_size"] == seen


def test_accelerate_places_it(cut: Path) -> None:
    pytest.importorskip("accelerate")
    placed = transformers.AutoModelForCausalLM.from_pretrained(cut, device_map="auto")
    assert next(placed.parameters()).device.type != "meta"
    plain = transformers.AutoModelForCausalLM.from_pretrained(cut)
    assert torch.equal(logits(placed).cpu(), logits(plain))


def to_gguf(directory: Path, path: Path) -> None:
    """What a converter does with a Llama: stock names, stock metadata, rotary halves of q and k interleaved."""
    config = transformers.AutoConfig.from_pretrained(directory)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for file in sorted(directory.glob("model-*.safetensors")):
        for name, tensor in load_file(file).items():
            stem, suffix = name.rsplit(".", 1)
            new = names.get_name(stem)
            assert new is not None, f"{name} has no GGUF name"
            values = tensor.float().numpy()
            for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
                if stem.endswith(part):
                    values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            writer.add_tensor(f"{new}.{suffix}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_it_converts_to_gguf(cut: Path, tmp_path: Path) -> None:
    to_gguf(cut, tmp_path / "model.gguf")
    read = gguf.GGUFReader(tmp_path / "model.gguf")
    shapes = {tensor.name: tuple(int(length) for length in tensor.shape) for tensor in read.tensors}
    hidden = transformers.AutoConfig.from_pretrained(cut).hidden_size
    for layer in range(2):
        assert shapes[f"blk.{layer}.ffn_gate.weight"] == shapes[f"blk.{layer}.ffn_up.weight"] == (hidden, KEPT)
        assert shapes[f"blk.{layer}.ffn_down.weight"] == (KEPT, hidden)
    assert read.fields["llama.feed_forward_length"].contents() == KEPT
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    expected = logits(transformers.AutoModelForCausalLM.from_pretrained(cut))
    assert (logits(back) - expected).abs().max() <= 1e-5 * expected.abs().max()
