"""Checkpoints for what happens after a cut: other heads, other names, code files, layers that the class does not load."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from surgery.planning.file import write_plan
from tests.support.plans import planned
from tests.support.tiny import redrawn, tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.planning.plan import PruningPlan

VOCABULARY = 97
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(2))


def saved(model: Any, directory: Path, seed: int = 0) -> Path:
    """Save ``model`` with new random weights, and a tokenizer."""
    redrawn(model, seed).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def llama(directory: Path, width: int = 40, **changes: Any) -> Path:
    config = transformers.LlamaConfig(**SIZES, intermediate_size=width, num_key_value_heads=2, **changes)
    return saved(transformers.LlamaForCausalLM(config), directory)


def legacy_gpt2(directory: Path) -> Path:
    """A GPT-2 whose tensors lack the prefix of the class, as on the Hub."""
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_inner=40, n_layer=2, n_head=4, n_positions=64)
    saved(transformers.GPT2LMHeadModel(config), directory)
    put(directory, {name.removeprefix("transformer."): value for name, value in tensors(directory).items()})
    return directory


def tuned(directory: Path, kind: Any, target: Path, **arguments: Any) -> Path:
    """A fine-tune of ``directory`` as ``kind``, saved by transformers in ``target``."""
    model = kind.from_pretrained(directory, **arguments)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(target)
    tiny_tokenizer().save_pretrained(target)
    return target


def qwen3next(directory: Path) -> Path:
    """A mixture of experts with a layer for multi-token prediction, a copy of its last layer, that the class does not load."""
    config = transformers.Qwen3NextConfig(
        **SIZES | {"num_hidden_layers": 4},
        intermediate_size=48,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=28,
        num_experts=4,
        num_experts_per_tok=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )
    saved(transformers.Qwen3NextForCausalLM(config), directory)
    values = tensors(directory)
    add_layer(directory, "model.layers.3.", "mtp.layers.0.", {"mtp.fc.weight": torch.randn(32, 64)})
    assert tensors(directory).keys() > values.keys()
    return directory


def add_layer(directory: Path, like: str, prefix: str, more: dict[str, torch.Tensor]) -> None:
    """Add a copy of the tensors under ``like`` under ``prefix``, with its FFN drawn anew, and ``more``."""
    values = tensors(directory)
    generator = torch.Generator().manual_seed(11)
    for name, value in list(values.items()):
        if name.startswith(like):
            new = torch.randn(value.shape, generator=generator) if "mlp" in name else value.clone()
            values[prefix + name.removeprefix(like)] = new
    put(directory, values | more)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def put(directory: Path, values: dict[str, torch.Tensor]) -> None:
    save_file(values, directory / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def half_plan(directory: Path, path: Path | None = None) -> PruningPlan:
    """A plan that keeps half of every FFN of ``directory``, at random; also written to ``path``."""
    plan = planned(directory, lambda number, ffn: ffn.width // 2)
    if path is not None:
        write_plan(plan, path)
    return plan


def masked(model: Any, plan: PruningPlan, prefix: str = "", old: str = "") -> Any:
    """``model`` with the activations of the channels that ``plan`` removes set to 0 by hooks. ``prefix`` replaces ``old``."""
    for block in plan.blocks:
        write = next(item for item in block.tensors if item.role == "write")
        name = prefix + write.parameter.removesuffix(".weight").removeprefix(old)
        gone = torch.from_numpy(block.removed_of(0)).long()
        model.get_submodule(name).register_forward_pre_hook(lambda module, inputs, gone=gone: inputs[0].index_fill(-1, gone, 0.0))
    return model.eval()
