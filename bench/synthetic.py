"""Atlases of the size of real ones, for the other scripts; and checkpoints of the shape of real ones.

    python bench/synthetic.py SHAPE DIRECTORY [--blocks N]     write a random bfloat16 checkpoint, one shard per block

The script holds one shard in memory at a time. The directory also gets a tokenizer of bytes, and ``tokens.npz`` with 8 sequences of
64 random tokens, which `atlas build --calib` takes. SHAPE is one of `SHAPES`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import chanfmt
from chanfmt.algebra.labels import support_sizes
from chanfmt.format import schema
from chanfmt.format.records import (
    AtlasContent,
    Block,
    CalibrationRecord,
    Contribution,
    LabelSettings,
    ModelRecord,
    ProducerRecord,
    StackData,
    TensorSlice,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

HIDDEN = 4096
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
}
OF_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": ("llama", LLAMA_8B),
    "mistral-7b": ("mistral", OF_7B | {"vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8}),
    "llama-2-7b": ("llama", OF_7B | {"vocab_size": 32000, "intermediate_size": 11008}),
    "qwen2-7b": (
        "qwen2",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
    ),
    "olmo-2-7b": ("olmo2", OF_7B | {"vocab_size": 100352, "intermediate_size": 11008}),
    "llama-3-70b": (
        "llama",
        LLAMA_8B | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    ),
    "tiny": (
        "llama",
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
}
"""Model type and fields of the config."""
SEQUENCES, SEQ_LEN = 8, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--blocks", type=int, help="number of blocks, if not all of them")
    arguments = parser.parse_args()
    kind, fields = SHAPES[arguments.shape]
    began = time.perf_counter()
    nbytes = write_checkpoint(
        arguments.directory, kind, fields | ({"num_hidden_layers": arguments.blocks} if arguments.blocks else {})
    )
    print(f"{arguments.directory}: {nbytes / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s")


def write_checkpoint(directory: Path, kind: str, fields: dict[str, Any]) -> int:
    """Write a checkpoint with random weights, one shard at a time. Returns the bytes of its tensors.

    Args:
        directory: A directory that does not exist yet.
        kind: Model type.
        fields: Fields of the config.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    config = transformers.AutoConfig.for_model(kind, bos_token_id=256, eos_token_id=257, tie_word_embeddings=False, **fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    ids = np.random.default_rng(0).integers(3, min(fields["vocab_size"], 100000), (SEQUENCES, SEQ_LEN))
    np.savez(directory / "tokens.npz", input_ids=ids)
    names, nbytes = {}, 0
    for number, tensors in enumerate(_shards(model)):
        file = f"model-{number:05}.safetensors"
        save_file(tensors, directory / file, {"format": "pt"})
        names |= dict.fromkeys(tensors, file)
        nbytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": nbytes}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return nbytes


def _shards(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Random tensors by name: first those around the blocks of ``model``, which has no weights, then one block at a time."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def random(name: str, like: torch.Tensor) -> torch.Tensor:
        if like.ndim < 2:
            return torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0, dtype=like.dtype)
        return torch.randn(like.shape, generator=generator).mul_(like.shape[-1] ** -0.5).to(like.dtype)

    state, blocks = model.state_dict(), model.config.num_hidden_layers
    groups = ["", *(f"model.layers.{number}." for number in range(blocks))]
    for group in groups:
        inside = [name for name in state if (name.startswith(group) if group else not name.startswith("model.layers."))]
        yield {name: random(name, state[name]) for name in inside}


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are bytes, and the beginning and the end of a text."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: index for index, token in enumerate([*alphabet, "<s>", "</s>"])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def synthetic_content(layers: int, experts: int, channels: int) -> AtlasContent:
    """An atlas with every variable of the format and as many tensors as a real model. Its values are heavy-tailed noise."""
    random = np.random.default_rng(0)
    kind = "experts" if experts else "dense"
    sequences, seq_len = 64, 512
    settings = LabelSettings()
    supports = support_sizes(HIDDEN, settings.support_size)
    lengths = {
        "layer": layers,
        "expert": experts,
        "channel": channels,
        "split": schema.SPLITS,
        "support": len(supports),
        "nearest": schema.NEAREST,
    }
    variables = {}
    for variable in schema.STACK_VARIABLES:
        shape = tuple(lengths[name] for name in schema.stack_dimensions(variable, kind))
        if variable.dtype.startswith("f"):
            variables[variable.name] = np.exp(2 * random.standard_normal(shape, dtype=np.float32))
        else:
            variables[variable.name] = random.integers(0, 3, shape).astype(variable.dtype)
    blocks = []
    for layer in range(layers):
        owners = [f"model.layers.{layer}.mlp" + (f".experts.{expert}" if experts else "") for expert in range(max(experts, 1))]
        tensors = tuple(
            TensorSlice(role, f"{owner}.{name}.weight", f"{owner}.{name}.weight", axis, 0, channels)
            for owner in owners
            for role, name, axis in (("gate", "gate_proj", 0), ("up", "up_proj", 0), ("write", "down_proj", 1))
        )
        blocks.append(Block(layer, layer, "decoder", f"model.layers.{layer}.mlp", "decoder", layer, channels, experts, tensors))
    stack = StackData("decoder", kind, True, "silu", np.arange(layers), channels, experts, schema.SPLITS, variables, supports)
    return AtlasContent(
        title="importance atlas of noise",
        model=ModelRecord("bench/noise", "", "local", "llama", ("LlamaForCausalLM",), "{}", "0" * 64, "float32", 1, "f" * 64),
        calibration=CalibrationRecord(
            schema.LOSSES["next-token"],
            schema.METRIC_DEFINITION,
            "none",
            seq_len,
            0,
            1.0,
            tuple(f"{index:064x}" for index in range(sequences)),
            np.zeros(sequences, dtype=np.int32),
            np.arange(sequences, dtype=np.uint8) * schema.SPLITS // sequences,
            (Contribution("c" * 32, "noise", "", f"0:{sequences}", sequences, sequences * seq_len, "bench"),),
            random.integers(0, 1000, (sequences, seq_len)).astype(np.int32),
        ),
        labels=settings,
        core_rho=settings.rho,
        blocks=tuple(blocks),
        stacks=(stack,),
        producer=ProducerRecord({"chanfmt": chanfmt.__version__}, "bench", "cpu", 1.0, 1),
    )


if __name__ == "__main__":
    main()
