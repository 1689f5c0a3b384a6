"""A tiny random instance of every model type that an AutoModel class of the installed transformers can build.

Each instance comes from the stock config of its type. Every size in the config is shrunk, as its name suggests.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

from tests.support.tiny import VOCAB, redrawn

CAUSAL, MASKED, SEQ2SEQ = "causal", "masked", "seq2seq"
IMAGE, SPEECH, AUDIO = "image", "speech", "audio"

HIDDEN = 32
HEADS = 4

UNBUILDABLE: dict[str, str] = {
    "dinat": "it needs natten",
    "gemma3n": "its vision tower is a TimmWrapperModel, which needs timm and pillow",
    "timm_wrapper": "it needs timm and pillow",
    "gemma4_assistant": "its config demands that every layer shares its keys, which Gemma4TextConfig.kv_sharing_modes refuses",
}
"""The types that cannot be built here, of any family, and why."""

BACKWARD_IN_TRAINING: frozenset[str] = frozenset({"reformer"})
"""Types that refuse a backward pass in evaluation mode; they have no dropout here, so training mode computes the same."""

_FAMILIES: dict[str, tuple[dict[str, Any], Any]] = {
    CAUSAL: (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM),
    MASKED: (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, transformers.AutoModelForMaskedLM),
    SEQ2SEQ: (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForSeq2SeqLM),
    IMAGE: (modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, transformers.AutoModelForImageClassification),
    SPEECH: (modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, transformers.AutoModelForSpeechSeq2Seq),
    AUDIO: (modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES, transformers.AutoModelForAudioClassification),
}

_SIZES: tuple[tuple[str, int], ...] = (
    (r"chunk_size_feed_forward", 0),
    (r".*vocab(_sizes?.*)?", VOCAB),
    (r"blank_token_id", VOCAB - 1),
    (r"codebook_size", 128),
    (r".*(position_embeddings|_positions|max_pos_emb)|n_ctx|max_seq_len|context_length|model_max_length", 128),
    (r"num_experts_per_tok(en)?|moe_(k|topk|top_k)|top_k_experts|zero_expert_num", 2),
    (r"(.*_)?experts", 4),
    (r"topk_group", 1),
    (r"n_group|num_expert_group|(.*_)?n_?groups|num_groups", 2),
    (r".*shared_(experts?_)?intermediate_size", 36),
    (r"(.*_)?moe_intermediate_size|expert_ffn_hidden_size", 28),
    (r"intermediate_size_mlp|dense_intermediate_size|encoder_ffn_dim", 52),
    (r".*intermediate_size|.*ffn_dim|.*ffn_hidden_size|d_ff|dff|dim_ff|(n|d)_inner|hidden_dim|feed_forward_size|mlp_dim", 44),
    (r".*(key_value|kv)_heads|kv_n_heads|num_query_groups|linear_num_key_heads|index_n_heads", 2),
    (r"(.*_)?(num|n|attention)_(.*_)?heads?", HEADS),
    (r"num_dense_layers|first_k_dense_replace|num_sparse_(en|de)coder_layers|depths", 1),
    (r"(.*_)?(n|num|encoder|decoder)_(hidden_|encoder_|decoder_|kv_shared_)?layers?|depth|num_blocks|.*sparse_step", 2),
    (r"num_self_attends_per_block", 2),
    (r"kv_lora_rank", 12),
    (r"(.*_)?(low)?rank", 20),
    (r"qk_nope_head_dim|v_head_dim", 12),
    (r"qk_rope_head_dim|d_kv|dim_head|d_head|attention_head_size", 8),
    (r"(mamba|linear|index|attention)_.*head_?dim|mamba_d_head", 16),
    (r"kv_channels|intra_bottleneck_size", 24),
    (r"num_filters", 4),
    (r"d_latents", 40),
    (r"rotary_dim", 4),
    (r".*(d_state|state_size)", 8),
    (r"(mamba_|attention_)?chunk_size|index_block_size|context_size", 16),
    (r".*window(_size|_len)?|block_size|local_attention|local_radius|num_centroids|num_latents", 16),
    (r"index_topk|rel_extent", 8),
    (r"image_size|crop_size", 32),
    (r"(hidden_size_per_layer_input|router_hidden_size|prediction_head_size|entity_emb_size)", 20),
    (r".*_channels?", 32),
    (r".*hidden_size.*|d_model|n_embd|(.*_)?dim|dim_model_base", HIDDEN),
)
"""What the name of a field says of its size: the first that matches counts, and it only ever shrinks."""

_DERIVED = re.compile(r"qk_head_dim|time_step_rank|number_of_conv_states|num_layers_per_stack|true_hidden_size")
"""Fields that a configuration works out from others when it is made anew."""

_HIDDEN_NAMES = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim")
_HEADS_NAMES = ("num_attention_heads", "num_heads", "n_heads", "n_head", "attention_heads")
_LAYERS_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")

_GIVEN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": "auto"},
    "cohere_asr": {"pad_token_id": 0, "decoder_start_token_id": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "cvt": {"depth": [1, 2, 3], "num_heads": [1, 2, 4]},
    "dbrx.attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "deepseek_v2": {"first_k_dense_replace": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 28},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 28,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note_text": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 20,
        "swa_kv_lora_rank": 12,
        "swa_head_dim": 20,
        "swa_qk_nope_head_dim": 12,
        "swa_v_head_dim": 12,
    },
    "donut-swin": {"num_heads": [2, 4, 4, 4], "image_size": 224},
    "efficientnet": {"hidden_dim": 2560},
    "encoder-decoder.decoder": {"is_decoder": True, "add_cross_attention": True},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 0, "mask_token_id": 3},
    "esmc": {"vocab_size": VOCAB, "num_key_value_heads": HEADS},
    "fun_asr_nano.adaptor_config": {"intermediate_size": HIDDEN // 4},
    "falcon_h1": {"mamba_d_ssm": 2 * HIDDEN, "mamba_d_head": "auto"},
    "flint": {"mlp_only_layers": [0]},
    "gemma4.text_config": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 28},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma4_unified_assistant.text_config": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "granitemoeshared": {"shared_intermediate_size": 36},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 24},
    "hunyuan_v1_moe": {"head_dim": 24, "num_experts": 4, "moe_topk": 2},
    "inkling_text": {"mlp_layer_types": ["dense", "sparse"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "kyutai_speech_to_text": {"audio_pad_token_id": 0},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "minimax_m3_vl_text": {"mlp_layer_types": ["dense", "sparse"]},
    "ministral": {"head_dim": 24},
    "mobilevitv2": {"image_size": 64},
    "moonshine": {"pad_token_id": 0, "encoder_num_key_value_heads": HEADS, "decoder_num_key_value_heads": HEADS},
    "moonshine_streaming": {"num_key_value_heads": HEADS, "pad_token_id": 0, "decoder_start_token_id": 1},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "neomme": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "perceiver": {"self_attention_widening_factor": 2, "cross_attention_widening_factor": 2},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": {"mlp_only_layers": [0]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 24,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "num_buckets": 4,
        "hash_seed": 0,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "speech-encoder-decoder.decoder": {"is_decoder": True, "add_cross_attention": True},
    "speech-encoder-decoder": {"pad_token_id": 0, "decoder_start_token_id": 1},
    "swin": {"num_heads": [2, 4, 4, 4], "image_size": 224},
    "swinv2": {"num_heads": [2, 4, 4, 4], "image_size": 224},
    "vibevoice_acoustic_tokenizer_encoder": {"downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
    "whisper": {"decoder_start_token_id": 1},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0, "ffn_round_up_to_multiple_of": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 2 * HIDDEN,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 2 * HIDDEN,
    },
}
"""What the stock configuration of a type leaves out, or what the names of its fields do not say."""


FAMILIES = tuple(_FAMILIES)
GIVEN_ARRAYS = (IMAGE, SPEECH, AUDIO)
"""The families that are measured on arrays rather than text."""


def types_of(family: str) -> list[str]:
    return sorted(_FAMILIES[family][0])


def causal_types() -> list[str]:
    return types_of(CAUSAL)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _first(fields: dict[str, Any], names: tuple[str, ...]) -> int:
    return next((fields[name] for name in names if _is_size(fields.get(name))), 0)


def _shrunk(name: str, value: int, fields: dict[str, Any]) -> int:
    """The shrunk value of the field ``name`` of a config with the stock ``fields``."""
    hidden, heads = _first(fields, _HIDDEN_NAMES), _first(fields, _HEADS_NAMES)
    inner = fields.get("expand", 0) * hidden  # The width of a state space layer.
    latent = fields.get("kv_lora_rank") is not None
    if value <= 0:
        return value
    if name in _TOKENS:
        return _TOKENS.index(name)
    if name in ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"):
        return 2  # With one, all shared experts together would be as wide as an expert.
    if name == "intermediate_size" and value == inner:
        return fields["expand"] * HIDDEN
    if name == "head_dim" and "expand" in fields and value * heads == inner:
        return fields["expand"] * HIDDEN // HEADS
    if name == "head_dim" and latent:
        return 8 if value == fields["qk_rope_head_dim"] else 20
    if name in ("head_dim", "swa_head_dim", "global_head_dim"):
        return HIDDEN // HEADS if value * heads == hidden else 24
    if name == "num_key_value_heads" and latent and value == heads:
        return HEADS
    if "embedding_size" in name:
        return HIDDEN if value == hidden else 24
    name = name.removesuffix("_per_layer")
    default = HIDDEN if value == hidden else value
    return min(value, next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), default))


def _shrink(config: Any, path: str) -> Any:
    """A copy of ``config``, found at ``path`` of another, with every size shrunk."""
    fields = vars(config)
    given: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PretrainedConfig):
            given[name] = _shrink(value, f"{path}.{name}")
        elif _is_size(value) and not _DERIVED.fullmatch(name):
            given[name] = _shrunk(name, value, fields)
        elif name in _TOKENS and isinstance(value, list):
            given[name] = _TOKENS.index(name)
        elif isinstance(value, list | tuple) and value and all(map(_is_size, value)):
            shrunk = [_shrunk(name, v, fields) for v in value]
            if shrunk != list(value):  # Most lists are made anew from the rest.
                given[name] = shrunk
    if "use_cache" in fields:
        given["use_cache"] = False  # Some write to their caches in place, which a backward pass does not survive.
    given |= _kinds(fields, given) | _GIVEN.get(config.model_type, {}) | _GIVEN.get(path, {})
    return type(config)(**given)


def _kinds(fields: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The number of layers, and every list with an entry for each, when only the first layer of each kind is kept."""
    name = next((k for k in _LAYERS_NAMES if k in fields), None)
    if name is None or not _is_size(fields[name]) or (count := fields[name]) < 2:
        return {}
    lists = {k: v for k, v in fields.items() if isinstance(v, list | tuple) and len(v) == count}
    # A list that counts the layers says nothing of their kinds, and is made anew from the rest.
    counted = {k for k, v in lists.items() if list(v) in (list(range(count)), list(range(1, count + 1)))}
    for k in counted:
        del lists[k]
    first = {repr([v[i] for v in lists.values()]): i for i in reversed(range(count))}
    kept = sorted(first.values()) if len(first) > 1 else [0, 1]
    return {name: len(kept)} | {k: [given.get(k, v)[i] for i in kept] for k, v in lists.items()}


def tiny_config(model_type: str, family: str = CAUSAL, **changes: Any) -> Any:
    """The config of ``model_type`` with 2 layers or more, at least one of every kind in the stock config; then ``changes``."""
    config = _shrink(CONFIG_MAPPING[model_type](), model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    if family == CAUSAL:
        for name in ("is_decoder", "causal"):
            if getattr(config, name, None) is False:
                setattr(config, name, True)
    return config


def tiny(model_type: str, family: str = CAUSAL, seed: int = 0, **changes: Any) -> Any:
    """A random model of ``model_type`` in evaluation mode, float32, with weights large enough to matter.

    Args:
        changes: Fields of the config to set.
    """
    config = tiny_config(model_type, family, **changes)
    names, auto = _FAMILIES[family]
    if isinstance(names[model_type], tuple):  # Several classes: that of the checkpoint is loaded.
        config.architectures = [names[model_type][0]]
    torch.manual_seed(seed)
    if model_type in ("musicgen", "musicgen_melody"):
        # AutoModelForCausalLM hands the whole configuration to a class that takes that of the decoder.
        model = auto._model_mapping[type(config)]._from_config(config.decoder, dtype=torch.float32, attn_implementation="eager")
    else:
        model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager")
    return redrawn(model, seed)


def run(model: Any, family: str, ids: torch.Tensor) -> torch.Tensor:
    """The logits of one forward pass over text, ``ids`` (sequence, position); an encoder's text is also its decoder's."""
    takes = inspect.signature(model.forward).parameters
    if "shared_kv_states" in takes:
        return model(**_assistant_inputs(model, ids)).logits
    inputs: dict[str, Any] = {"input_ids" if "input_ids" in takes else "inputs": ids}
    if family == SEQ2SEQ and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = ids
    if "encoder_inputs_embeds" in takes:
        audio = model.config.audio_config
        frames = ids.shape[1] * model.config.downsample_factor
        inputs["encoder_inputs_embeds"] = torch.randn(
            len(ids), frames, audio.hidden_size, generator=torch.Generator().manual_seed(0)
        )
    return model(**inputs).logits


def _assistant_inputs(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """The inputs that an assistant takes from the model that it drafts for: hidden states, and keys and values of each kind of layer."""
    config = model.config.get_text_config()
    embedded = model.get_input_embeddings()(ids)
    generator = torch.Generator().manual_seed(0)
    shared: dict[str, Any] = {}
    for layer, kind in enumerate(config.layer_types):
        attention = config.per_layer_config[layer]
        shape = (len(ids), attention.num_key_value_heads, ids.shape[1], attention.head_dim)
        shared[kind] = tuple(torch.randn(shape, generator=generator) for _ in range(2))
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    return {"inputs_embeds": torch.cat([embedded, embedded], dim=-1), "shared_kv_states": shared, "position_ids": positions}
