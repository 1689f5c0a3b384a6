"""Train a small Llama from scratch on the documentation that ships with Python, and save checkpoints on the way.

    python examples/train.py DIR

The model has four layers of 512 FFN channels, 1.1 million parameters, and a byte-level BPE of 1,024 tokens. AdamW trains it
for 1,024 steps of 2,048 tokens, which takes a few minutes on two cores. The checkpoints after 1, 2, 4, ... 1,024 steps are
written to DIR/checkpoint-STEP; transformers can load each directory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

VOCABULARY, STEPS, BATCH, LENGTH = 1024, 1024, 8, 256
PEAK_RATE, WARM_UP = 3e-3, 50


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `VOCABULARY` tokens on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def rate(step: int) -> float:
    """Learning rate at ``step``: a warm-up, then a linear decay to a tenth of the peak."""
    return PEAK_RATE * min(step / WARM_UP, 1.0 - 0.9 * step / STEPS)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: {sys.argv[0]} DIR")
    directory = Path(sys.argv[1])
    logging.disable_progress_bar()
    texts = [topics[name] for name in sorted(topics)]
    tokenizer = make_tokenizer(texts)
    tokens = torch.cat([torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in texts])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH * 2,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {len(tokens):,} tokens")
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,))
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step & (step - 1) == 0:
            place = directory / f"checkpoint-{step}"
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
            print(f"step {step:>5}   loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main()
