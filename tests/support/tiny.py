"""Tiny random models of many architectures, built from stock configs.

Every dimension is a different number, so that a mistaken dimension is noticed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from pathlib import Path

VOCAB = 211

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 36,
        "intermediate_size": 87,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 128,
    },
    "gpt2": {"n_embd": 36, "n_inner": 87, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "opt": {
        "hidden_size": 36,
        "ffn_dim": 87,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 36,
    },
    "phi3": {
        "hidden_size": 36,
        "intermediate_size": 87,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 128,
    },
    "gpt_neox": {
        "hidden_size": 36,
        "intermediate_size": 87,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "max_position_embeddings": 128,
    },
    "bert": {
        "hidden_size": 36,
        "intermediate_size": 87,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "max_position_embeddings": 128,
        "is_decoder": True,
    },
}
"""The architectures that every end-to-end test runs on."""


def tiny_model(model_type: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random causal LM of ``model_type`` in evaluation mode, with weights large enough to matter."""
    values = {
        "vocab_size": VOCAB,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **CONFIGS.get(model_type, {}),
        **changes,
    }
    config = transformers.AutoConfig.for_model(model_type, **values)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return redrawn(model, seed)


def redrawn(model: Any, seed: int) -> Any:
    """``model`` in evaluation mode with random weights large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # The stock initialisation is so small that logits, gradients and biases hardly differ from zero.
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.0 / parameter.shape[-1] ** 0.5, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.05)
    return model.eval()


def random_tokens(sequences: int, seq_len: int, seed: int = 0) -> torch.Tensor:
    """Token ids that repeat often enough for a model to have something to say, int64 (sequence, position)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (sequences, seq_len), generator=generator)


def tiny_tokenizer() -> Any:
    """One token per character; unknown characters are ``<unk>``."""
    import string

    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {text: index for index, text in enumerate([*specials, *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tokenizer_around(template: str) -> Any:
    """`tiny_tokenizer` with special tokens around a text, such as ``<s> $A </s>``."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    specials = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<pad>", "<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=specials)
    return tokenizer


def save_tiny(directory: Path, model_type: str, **changes: Any) -> Path:
    """A checkpoint directory of `tiny_model` with a tokenizer. Returns ``directory``."""
    tiny_model(model_type, **changes).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
