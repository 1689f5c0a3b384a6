"""A model's config as GGUF metadata, for architectures of which llama.cpp and transformers compute the same from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import ModelError
from chanfmt.base.text import one_line
from chanfmt.models.gguf_header import FLOAT32, Value

if TYPE_CHECKING:
    from collections.abc import Mapping

LLAMA = "llama"
ARCHITECTURES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": "qwen2", "qwen3": "qwen3"}
"""Model type to the name of its architecture in llama.cpp."""
_QWEN3_HEAD = 128
"""Head size of Qwen3 models. transformers does not read it from a GGUF file."""


def hyperparameters(config: Any) -> dict[str, Value]:
    """The metadata of the model that ``config`` describes, without its tokenizer.

    Raises:
        ModelError: The model is of another type, or computes something that the metadata cannot say.
    """
    kind = ARCHITECTURES.get(config.model_type)
    if kind is None:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"its type is {one_line(str(config.model_type))}, and these are written: {known}")
    if reason := _refusal(config, kind):
        raise ModelError(reason)
    heads, head = config.num_attention_heads, head_size(config)
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads or heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
        "vocab_size": config.vocab_size,
    }
    floats = {"attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": _rotation(config)["rope_theta"]}
    return {
        "general.architecture": Value.of(kind),
        "general.type": Value.of("model"),
        **{f"{kind}.{name}": Value.of(int(number)) for name, number in numbers.items()},
        **{f"{kind}.{name}": Value.of(float(number), FLOAT32) for name, number in floats.items()},
    }


def head_size(config: Any) -> int:
    """Numbers of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotation(config: Any) -> Mapping[str, Any]:
    """The parameters of the rotary embedding."""
    found = getattr(config, "rope_parameters", None) or {}
    return {"rope_theta": getattr(config, "rope_theta", 10000.0), **found}


def _refusal(config: Any, kind: str) -> str:
    """What ``config`` has that the metadata cannot say, or that transformers does not read back; empty if that is nothing."""
    rotation = _rotation(config)
    window = getattr(config, "sliding_window", None)
    if kind != LLAMA:
        window = window if getattr(config, "use_sliding_window", False) else None
    if rotation.get("rope_type", "default") != "default" or rotation.get("partial_rotary_factor", 1) != 1:
        return (
            f"its positions are scaled ({one_line(str(rotation.get('rope_type')))}), which transformers does not read from GGUF"
        )
    if config.hidden_act != "silu":
        return f"its activation is {one_line(str(config.hidden_act))}, and llama.cpp computes silu"
    if window is not None and window < config.max_position_embeddings:
        return f"its attention has a window of {window} tokens, which the file cannot say"
    if kind in (LLAMA, "qwen3") and (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)):
        return "its projections have biases, which transformers does not read from GGUF"
    if kind == "qwen2" and head_size(config) != config.hidden_size // config.num_attention_heads:
        return "its heads have another size than its hidden size says, which transformers does not read from GGUF"
    if kind == "qwen3" and head_size(config) != _QWEN3_HEAD:
        return f"its heads have {head_size(config)} numbers, and transformers takes {_QWEN3_HEAD} for granted"
    return ""
