"""Random checkpoints and tokens for the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from bench.synthetic import byte_tokenizer
from chanfmt.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from pathlib import Path

SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "head_dim": 32}


def make(directory: Path, kind: str, sizes: dict[str, Any], *, device: str, sequences: int, seq_len: int) -> dict[str, Any]:
    """Write a bfloat16 checkpoint with random weights, a tokenizer of bytes, and ``tokens.npz`` (sequences, seq_len)."""
    config = transformers.AutoConfig.for_model(kind, bos_token_id=256, eos_token_id=257, tie_word_embeddings=False, **sizes)
    torch.manual_seed(0)
    with quiet_transformers(), torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    with quiet_transformers():
        model.save_pretrained(directory, max_shard_size="4GB")
    byte_tokenizer().save_pretrained(directory)
    ids = np.random.default_rng(0).integers(3, min(sizes["vocab_size"], 100000), (sequences, seq_len))
    np.savez(directory / "tokens.npz", input_ids=ids)
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}
