"""Tiny random models of six families, saved by transformers, with their FFNs written down by hand.

Widths are distinct and odd where the family allows it, so that no axis passes for another.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

from chanfmt.format.records import AtlasContent, Block, TensorSlice
from chanfmt.format.writer import write_atlas
from chanfmt.models.safetensors import CheckpointIndex, fingerprint
from tests.support.factory import random_content

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LAYERS, HIDDEN, WIDTH, VOCABULARY = 3, 24, 37, 53
HEADS = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "hidden_size": HIDDEN, "vocab_size": VOCABULARY}


@dataclass(frozen=True)
class Family:
    """One model type.

    Attributes:
        build: Makes the random model.
        module: Module of one layer's FFN; ``{}`` is the layer.
        roles: Role, tensor name behind ``module``, channel axis, and start and step in widths.
        width: Channels.
        field: Config field that holds the width.
    """

    build: Callable[[], Any]
    module: str
    roles: tuple[tuple[str, str, int | None, int, int], ...]
    field: str
    width: int = WIDTH
    gated: bool = False

    def blocks(self) -> tuple[Block, ...]:
        return tuple(self.block(layer) for layer in range(LAYERS))

    def block(self, layer: int) -> Block:
        module = self.module.format(layer)
        slices = []
        for role, name, axis, half, step in self.roles:
            tensor = f"{module}.{name}"
            start = half * self.width
            stop = start + step * self.width if axis is not None else 0
            slices.append(TensorSlice(role, tensor, tensor, axis, start, stop, step))
        return Block(layer, layer, "decoder", module, "decoder", layer, self.width, 0, tuple(slices))


def _llama(**extra: Any) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**HEADS, num_key_value_heads=2, intermediate_size=WIDTH, max_position_embeddings=64, **extra)
    )


def _gpt2(n_inner: int | None) -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=LAYERS, n_head=4, n_embd=20, vocab_size=VOCABULARY, n_positions=41, n_inner=n_inner)
    )


def _opt() -> Any:
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(**HEADS, word_embed_proj_dim=HIDDEN, ffn_dim=WIDTH, max_position_embeddings=41)
    )


def _phi3() -> Any:
    return transformers.Phi3ForCausalLM(
        transformers.Phi3Config(
            **HEADS, intermediate_size=WIDTH, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0
        )
    )


def _neox() -> Any:
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**HEADS, intermediate_size=WIDTH, max_position_embeddings=64)
    )


def _bert() -> Any:
    return transformers.BertLMHeadModel(
        transformers.BertConfig(**HEADS, intermediate_size=WIDTH, max_position_embeddings=41, is_decoder=True)
    )


_GATED = (
    ("gate", "gate_proj.weight", 0, 0, 1),
    ("up", "up_proj.weight", 0, 0, 1),
    ("write", "down_proj.weight", 1, 0, 1),
)


def _two_layers(read: str, write: str) -> tuple[tuple[str, str, int | None, int, int], ...]:
    return (
        ("up", f"{read}.weight", 0, 0, 1),
        ("up_bias", f"{read}.bias", 0, 0, 1),
        ("write", f"{write}.weight", 1, 0, 1),
        ("write_bias", f"{write}.bias", None, 0, 1),
    )


_CONV1D = (
    ("up", "c_fc.weight", 1, 0, 1),
    ("up_bias", "c_fc.bias", 0, 0, 1),
    ("write", "c_proj.weight", 0, 0, 1),
    ("write_bias", "c_proj.bias", None, 0, 1),
)

FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, "model.layers.{}.mlp", _GATED, "intermediate_size", gated=True),
    "llama-tied": Family(
        lambda: _llama(tie_word_embeddings=True), "model.layers.{}.mlp", _GATED, "intermediate_size", gated=True
    ),
    "gpt2": Family(lambda: _gpt2(None), "transformer.h.{}.mlp", _CONV1D, "n_inner", width=80),
    "gpt2-inner": Family(lambda: _gpt2(WIDTH), "transformer.h.{}.mlp", _CONV1D, "n_inner"),
    "opt": Family(_opt, "model.decoder.layers.{}", _two_layers("fc1", "fc2"), "ffn_dim"),
    "phi3": Family(
        _phi3,
        "model.layers.{}.mlp",
        (
            ("gate", "gate_up_proj.weight", 0, 0, 1),
            ("up", "gate_up_proj.weight", 0, 1, 1),
            ("write", "down_proj.weight", 1, 0, 1),
        ),
        "intermediate_size",
        gated=True,
    ),
    "gpt_neox": Family(_neox, "gpt_neox.layers.{}.mlp", _two_layers("dense_h_to_4h", "dense_4h_to_h"), "intermediate_size"),
    "bert": Family(_bert, "bert.encoder.layer.{}", _two_layers("intermediate.dense", "output.dense"), "intermediate_size"),
}


def save_model(name: str, directory: Path, **arguments: Any) -> Path:
    """Save the random model ``name``; biases are filled, since transformers starts them at 0."""
    torch.manual_seed(5)
    model = FAMILIES[name].build()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(directory, **arguments)
    return directory


def content_for(name: str, directory: Path, **model: Any) -> AtlasContent:
    """An atlas's content with random statistics for the model ``name`` saved in ``directory``."""
    family = FAMILIES[name]
    content = random_content(layers=LAYERS, channels=family.width, hidden=HIDDEN)
    tokens = content.calibration.token_ids
    assert tokens is not None
    stack = dataclasses.replace(content.stacks[0], gated=family.gated)
    if not family.gated:
        variables = {key: value for key, value in stack.variables.items() if key != "gate_norm"}
        stack = dataclasses.replace(stack, variables=variables)
    record = dataclasses.replace(
        content.model, id=f"tiny/{name}", fingerprint=fingerprint(CheckpointIndex.open(directory)), **model
    )
    return dataclasses.replace(
        content,
        model=record,
        blocks=family.blocks(),
        stacks=(stack,),
        calibration=dataclasses.replace(content.calibration, token_ids=tokens % VOCABULARY),
    )


def save_atlas(name: str, directory: Path, path: Path, **model: Any) -> Path:
    """Write `content_for` to ``path``."""
    write_atlas(content_for(name, directory, **model), path)
    return path
