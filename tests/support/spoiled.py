"""Tiny checkpoints with something in their files that a loaded model does not show."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny import save_tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SINGLE = "model.safetensors"


def llama(directory: Path, **changes: Any) -> Path:
    """A clean checkpoint."""
    return save_tiny(directory, "llama", **changes)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint in one file."""
    return load_file(directory / SINGLE)


def store(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Replace the tensors of a checkpoint. Returns ``directory``."""
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, directory / SINGLE, {"format": "pt"})
    return directory


def edit_config(directory: Path, **fields: Any) -> Path:
    """Set fields of ``config.json``. Returns ``directory``."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


def fp8(directory: Path) -> Path:
    """FP8 weights with their scales; only ``hf_quant_config.json`` says so."""
    llama(directory)
    tensors = {}
    for name, tensor in stored(directory).items():
        if name.endswith("proj.weight"):
            scale = tensor.abs().max() / 448
            tensors[name], tensors[f"{name}_scale"] = (tensor / scale).to(torch.float8_e4m3fn), scale
        else:
            tensors[name] = tensor.bfloat16()
    (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    return store(directory, tensors)


def surplus_bias(directory: Path) -> Path:
    """Biases that the stock class has no place for, as FLAP writes them."""
    llama(directory)
    tensors = stored(directory)
    for layer in range(3):
        tensors[f"model.layers.{layer}.mlp.down_proj.bias"] = torch.randn(tensors["model.norm.weight"].shape)
    return store(directory, tensors)


def adapter(directory: Path) -> Path:
    """LoRA files of the FFNs beside full weights."""
    llama(directory)
    rank, tensors = 4, {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in stored(directory).items():
        if ".mlp." in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, tensor.shape[1], generator=generator)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(tensor.shape[0], rank, generator=generator)
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "user/base",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def mtp(directory: Path) -> Path:
    """A layer for multi-token prediction that the class lists as ignorable."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 44,
        "moe_intermediate_size": 28,
        "shared_expert_intermediate_size": 28,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    save_tiny(directory, "qwen3_next", **sizes)
    tensors = stored(directory)
    for name in [name for name in tensors if name.startswith("model.layers.3.")]:
        tensors[f"mtp.layers.0.{name.removeprefix('model.layers.3.')}"] = tensors[name]
    tensors["mtp.fc.weight"] = torch.randn(32, 64)
    return store(directory, tensors)


def index_without_metadata(directory: Path) -> Path:
    """Two shards and an index that has the weight map alone."""
    llama(directory)
    split(directory)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["metadata"]
    path.write_text(json.dumps(index))
    return directory


def split(directory: Path, *, keep: bool = False) -> Path:
    """Split the checkpoint into two shards with an index. Returns ``directory``.

    Args:
        keep: Whether the single file stays.
    """
    tensors = stored(directory)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if not keep:
        (directory / SINGLE).unlink()
    return directory


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "fp8": (fp8, "quantised (hf_quant_config.json says FP8)"),
    "surplus bias": (surplus_bias, "model.layers.0.mlp.down_proj.bias, which LlamaForCausalLM has no place for"),
    "adapter": (adapter, "an adapter beside its weights (adapter_config.json)"),
}
"""What makes a checkpoint, and a part of the sentence that refuses it."""
