"""A model's config as GGUF metadata, for architectures of which llama.cpp and transformers compute the same from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import ModelError
from chanfmt.base.text import one_line
from chanfmt.models.gguf_header import FLOAT32, Value
from chanfmt.models.gguf_rotation import LLAMA3, divisors
from chanfmt.models.rotary_fields import head_size, rotation

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

LLAMA, GEMMA3 = "llama", "gemma3"
ARCHITECTURES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": GEMMA3}
"""Model type to the name of its architecture in llama.cpp."""
_QWEN3_HEAD, _GEMMA3_HEAD = 128, 256
"""Head sizes that transformers takes for granted when it reads a GGUF file."""
_GEMMA3_PERIOD, _GEMMA3_LOCAL_THETA = 6, 1e4
"""Every sixth layer of a Gemma 3 sees all tokens. The other layers rotate by this base. A GGUF file says neither."""
_GEMMA3_WIDE_SCALE = 62
"""With this number of layers, llama.cpp scales the scores of attention in another way."""


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
    if kind == GEMMA3:
        numbers["attention.sliding_window"] = config.sliding_window
    if wrong := next((name for name, number in numbers.items() if not 0 <= int(number) < 1 << 32), None):
        raise ModelError(f"its {wrong} is {numbers[wrong]}, which is not a number of 32 bits")
    own = _rotation(config)
    floats = {"attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": own["rope_theta"]}
    texts = {}
    if own.get("rope_type") == "linear":
        texts["rope.scaling.type"], floats["rope.scaling.factor"] = "linear", own["factor"]
    return {
        "general.architecture": Value.of(kind),
        "general.type": Value.of("model"),
        **{f"{kind}.{name}": Value.of(int(number)) for name, number in numbers.items()},
        **{f"{kind}.{name}": Value.of(float(number), FLOAT32) for name, number in floats.items()},
        **{f"{kind}.{name}": Value.of(text) for name, text in texts.items()},
    }


def position_divisors(config: Any) -> np.ndarray | None:
    """The tensor of divisors by which llama.cpp scales the positions of a Llama 3, float32 (head / 2,); None without a scaling."""
    own = _rotation(config)
    return divisors(own, head_size(config)) if own.get("rope_type") == "llama3" else None


def scaling_note(config: Any) -> str:
    """A note on what transformers does not read back; empty if there is nothing."""
    kind = _rotation(config).get("rope_type", "default")
    if kind == "default":
        return ""
    return f"llama.cpp reads from the file how positions are scaled ({kind}), and transformers by itself does not"


def _rotation(config: Any) -> Mapping[str, Any]:
    """`rotation` with a base."""
    return {"rope_theta": getattr(config, "rope_theta", 10000.0), **rotation(config)}


def _refusal(config: Any, kind: str) -> str:
    """What ``config`` has that the metadata cannot say, or that transformers does not read back; empty if that is nothing."""
    own = _rotation(config)
    if kind == GEMMA3 and (reason := _gemma3_refusal(config)):
        return reason
    window = getattr(config, "sliding_window", None)
    if kind != LLAMA:
        window = window if getattr(config, "use_sliding_window", False) else None
    kind_of_rotation = own.get("rope_type", "default")
    # Other models with the scaling of a Llama 3 are unknown, and so are other numbers than those of the published ones.
    published = kind == LLAMA and all(own.get(name) == number for name, number in LLAMA3.items())
    if kind_of_rotation not in ("default", "linear", "llama3") or (kind_of_rotation == "llama3" and not published):
        return f"its positions are scaled ({one_line(str(kind_of_rotation))}) in a way that is not written"
    if own.get("partial_rotary_factor", 1) != 1:
        return "only a part of each head is rotated, which is not written"
    activation, known = (config.hidden_activation, "gelu_pytorch_tanh") if kind == GEMMA3 else (config.hidden_act, "silu")
    if activation != known:
        return f"its activation is {one_line(str(activation))}, and llama.cpp computes {known}"
    if window is not None and window < config.max_position_embeddings:
        return f"its attention has a window of {window} tokens, which the file cannot say"
    if kind != "qwen2" and (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)):
        return "its projections have biases, which transformers does not read from GGUF"
    if kind == "qwen2" and head_size(config) != config.hidden_size // config.num_attention_heads:
        return "its heads have another size than its hidden size says, which transformers does not read from GGUF"
    if kind == "qwen3" and head_size(config) != _QWEN3_HEAD:
        return f"its heads have {head_size(config)} numbers, and transformers takes {_QWEN3_HEAD} for granted"
    return ""


def _gemma3_refusal(config: Any) -> str:
    """As `_refusal`, for what is peculiar to a Gemma 3."""
    local = (config.rope_parameters or {}).get("sliding_attention", {})
    if local.get("rope_theta") != _GEMMA3_LOCAL_THETA or local.get("rope_type", "default") != "default":
        return "its layers with a window rotate in another way than llama.cpp's"
    kinds = [
        "full_attention" if number % _GEMMA3_PERIOD == 0 else "sliding_attention"
        for number in range(1, 1 + len(config.layer_types))
    ]
    if list(config.layer_types) != kinds or config.use_bidirectional_attention:
        return f"its attention is another than a window in all layers but every {_GEMMA3_PERIOD}th"
    if config.final_logit_softcapping or config.attn_logit_softcapping:
        return "its logits are capped, which the file cannot say"
    wide = config.num_hidden_layers == _GEMMA3_WIDE_SCALE
    if wide or not config.query_pre_attn_scalar == head_size(config) == _GEMMA3_HEAD:
        return f"its attention is scaled in another way than by heads of {_GEMMA3_HEAD} numbers, which transformers takes for granted"
    return ""
