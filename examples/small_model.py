"""A tiny Llama for the notebooks, trained in seconds on the documentation that ships with Python. It needs no network.

The model has four layers of 256 FFN channels. It has learned little, but its channels differ in importance, which those of a
random model hardly do. Every call in one process gives the same model; it is trained at the first call.
"""

from __future__ import annotations

import copy
import functools
from pydoc_data.topics import topics
from typing import Any

import torch
from train import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

STEPS, BATCH, LENGTH, RATE = 64, 4, 64, 5e-3
KEPT = (1, 4, 16, 64)
"""Steps after which a checkpoint is kept."""


def load(name: str | None = None) -> tuple[Any, Any]:
    """A model and its tokenizer: of a Hub id or a directory, or the tiny model if ``name`` is None."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    tokenizer, models = _trained()
    return models[STEPS], tokenizer


def checkpoints() -> tuple[dict[int, Any], Any]:
    """The tiny model after 1, 4, 16 and 64 steps of training, by step, and its tokenizer."""
    tokenizer, models = _trained()
    return models, tokenizer


@functools.cache
def _trained() -> tuple[Any, dict[int, Any]]:
    texts = [topics[name] for name in sorted(topics)]
    tokenizer = make_tokenizer(texts[:20])
    tokens = torch.tensor(tokenizer("\n".join(texts[:20]))["input_ids"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    kept = {}
    for step in range(1, STEPS + 1):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,))
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in KEPT:
            kept[step] = copy.deepcopy(model).eval()
    return tokenizer, kept
