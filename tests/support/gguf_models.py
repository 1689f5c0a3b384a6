"""Small models as GGUF files, as a converter writes them: stock names, stock metadata, a tokenizer of bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, WIDTH, LAYERS = 64, 256, 3
VOCABULARY = 259


def tiny_llama(directory: Path, **changes: Any) -> Path:
    """A Llama whose rows are whole blocks, saved in ``directory``."""
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
        **changes,
    )
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # Larger weights make the FFNs matter, so that an error in them shows in the logits.
                parameter.normal_(0, 0.15)
    model.save_pretrained(directory)
    return directory


def to_gguf(directory: Path, path: Path, kind: str = "F32", *, down: str | None = None, name: str = "Tiny") -> None:
    """What a converter and a quantiser do with a Llama: rotary halves of q and k interleaved, matrices in ``kind``.

    Args:
        down: Type of the down projections, if it is another one.
    """
    config = transformers.AutoConfig.from_pretrained(directory)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_size_label("1M")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if kind == "F32" else gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    for file in sorted(directory.glob("model*.safetensors")):
        for tensor, values in load_file(file).items():
            stem, suffix = tensor.rsplit(".", 1)
            new = names.get_name(stem)
            assert new is not None, f"{tensor} has no GGUF name"
            array = values.float().numpy()
            for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
                if stem.endswith(part):
                    array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            wanted = (down or kind) if stem.endswith("down_proj") else kind
            _add(writer, f"{new}.{suffix}", array, wanted if array.ndim > 1 else "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, name: str, values: np.ndarray, kind: str) -> None:
    chosen = gguf.GGMLQuantizationType[kind]
    if kind == "Q6_K":
        writer.add_tensor(name, _random_q6_k(values), raw_dtype=chosen)
    else:
        writer.add_tensor(name, np.ascontiguousarray(gguf.quants.quantize(values, chosen)), raw_dtype=chosen)


def _random_q6_k(values: np.ndarray) -> np.ndarray:
    """Rows of Q6_K, which the package gguf reads and does not write: random bits with small scales."""
    rows, columns = values.shape
    blocks = np.random.default_rng(int(1000 * abs(values[0, 0]))).integers(0, 256, (rows, columns // 256, 210), dtype=np.uint8)
    blocks[..., 192:208] = (blocks[..., 192:208] % 15) + 1
    blocks[..., 208:210] = np.frombuffer(np.float16(2e-3).tobytes(), dtype=np.uint8)
    return blocks.reshape(rows, -1)


def _add_tokenizer(writer: Any) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, "<s>", "</s>", letters[0] + letters[1]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(letters) + [3, 3, 1])
    # An array of a GGUF file says the type of its items, so it cannot be empty.
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
