"""Predicted against measured peak memory of a pass on CPUs: ``python bench/memory.py [SHAPE ...]``.

Each shape runs in a process of its own: a random float32 model with random tokens, or SmolLM2-135M (the environment variable
SMOLLM2_GGUF names the file). The prediction is the one that `atlas build` chooses its batch from, without its margin. "Pass"
compares what the pass adds to the resident set, "process" the whole resident set. A ratio above 1 says that more was predicted
than measured. Linux only.

    python bench/memory.py --computed     the arithmetic for Llama-3.1-8B and Llama-3-70B; nothing is measured
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from chanfmt.building.measure import measure
from chanfmt.building.memory_probe import probe_in_memory, probe_streamed
from chanfmt.building.predicted_memory import Prediction, predicted
from chanfmt.building.stream import measure_streamed
from chanfmt.data.tokens import CalibrationTokens, canonical
from chanfmt.format.records import LabelSettings
from chanfmt.models.find.discover import find_ffns
from chanfmt.models.load import load_model
from chanfmt.models.next_token import NextTokenLoss
from chanfmt.models.source import ModelSource
from chanfmt.models.streaming.spool import Spool
from chanfmt.models.streaming.streamed import open_streamed

RHO = 0.01
LLAMA = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}
MOE = {"intermediate_size": 512, "num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
SHAPES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "llama": ("LlamaConfig", {}, 3, 256),
    "gqa": ("LlamaConfig", {"num_key_value_heads": 2, "intermediate_size": 2048, "num_hidden_layers": 6}, 3, 256),
    "moe": ("MixtralConfig", MOE, 3, 256),
    "vocabulary": ("LlamaConfig", {"vocab_size": 65536, "hidden_size": 256, "num_hidden_layers": 4}, 4, 256),
    "long": ("LlamaConfig", {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}, 1, 2048),
    "eager": ("LlamaConfig", {"hidden_size": 256, "num_hidden_layers": 4, "attn_implementation": "eager"}, 1, 512),
    "streamed": ("LlamaConfig", {"num_hidden_layers": 3}, 4, 256),
    "smollm2": ("", {}, 2, 256),
}
"""Config class and fields, sequences in a batch, tokens in a sequence. The last shape is a real model."""
LARGE = {"8B": (4096, 14336, 32, 32, 8, 128256), "70B": (8192, 28672, 80, 64, 8, 128256)}
"""Hidden size, width, layers, heads, heads of keys and values, vocabulary."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--computed", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.computed:
        for name, shape in LARGE.items():
            computed(name, *shape)
        return
    if arguments.one:
        print(json.dumps(run(arguments.shapes[0])))
        return
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} thread(s); MB of 1e6 bytes"
    )
    print(
        f"{'shape':12}{'batch':>10}{'sums':>8}{'kept':>8}{'working':>9}{'predicted':>11}{'measured':>10}{'pass':>7}{'process':>9}"
    )
    for name in arguments.shapes or SHAPES:
        if name == "smollm2" and "SMOLLM2_GGUF" not in os.environ:
            print(f"{name:12} left out: SMOLLM2_GGUF names no file")
            continue
        done = subprocess.run([sys.executable, __file__, "--one", name], stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        mega = {key: round(value / 1e6) for key, value in found.items()}
        rest = found["statistics"] + found["weights"] + found["spool"]
        measured = found["peak"] - found["before"]
        print(
            f"{name:12}{SHAPES[name][2]:>4} x {SHAPES[name][3]:<4}{rest / 1e6:>7.0f}{mega['activations']:>8}{mega['working']:>9}"
            f"{mega['estimate']:>11}{measured / 1e6:>10.0f}{found['estimate'] / measured:>7.2f}"
            f"{(found['before'] + found['estimate']) / found['peak']:>9.2f}",
            flush=True,
        )


def run(name: str) -> dict[str, int]:
    """Predict and measure the shape called ``name`` in this process. Returns bytes by name."""
    kind, fields, sequences, length = SHAPES[name]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        if not kind:
            from chanfmt.hub.locate import locate_model

            model: Any = load_model(locate_model(os.environ["SMOLLM2_GGUF"]), device="cpu")
        else:
            config = getattr(transformers, kind)(**LLAMA | fields)
            model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        tokens = _tokens(sequences, length, model.config.vocab_size)
        if name != "streamed":
            return _in_memory(model, tokens, sequences)
        model.save_pretrained(directory)
        del model
        return _streamed(Path(directory), tokens, sequences)


def _in_memory(model: Any, tokens: CalibrationTokens, sequences: int) -> dict[str, int]:
    ffns, loss = find_ffns(model), NextTokenLoss(model, tokens.batch(0, 1, model))
    stages = probe_in_memory(model, ffns, tokens, rho=RHO, loss=loss)
    found, before = predicted(stages["cpu"], sequences, tokens.seq_len), _begin()
    measure(model, ffns, tokens, rho=RHO, loss=loss, batch_size=sequences)
    return _result(found, before)


def _streamed(directory: Path, tokens: CalibrationTokens, sequences: int) -> dict[str, int]:
    streamed = open_streamed(ModelSource(directory), device="cpu")
    loss = NextTokenLoss(streamed.chain.model, tokens.batch(0, 1, streamed.chain.model))
    limit = 1 << 30
    stages = probe_streamed(streamed, tokens, rho=RHO, loss=loss, spool_limit=limit)
    found, before = predicted(stages["cpu"], sequences, tokens.seq_len), _begin()
    with Spool(limit, directory) as spool:
        measure_streamed(streamed, tokens, spool, settings=LabelSettings(rho=RHO), loss=loss, batch_size=sequences)
    return _result(found, before)


def _tokens(sequences: int, length: int, vocabulary: int) -> CalibrationTokens:
    """Random tokens for three full batches: one before the core is chosen, and two after it."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (3 * sequences, length), dtype=np.int32)
    split_of = np.repeat(np.arange(3, dtype=np.uint8), sequences)
    return dataclasses.replace(canonical(ids), split_of=split_of)


def _begin() -> int:
    """Let the peak of the resident set begin anew. Returns the resident set in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _result(found: Prediction, before: int) -> dict[str, int]:
    return {**dataclasses.asdict(found), "estimate": found.estimate, "before": before, "peak": _status("VmHWM")}


def _status(name: str) -> int:
    line = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line is not None
    return int(line[1]) * 1024


def computed(name: str, hidden: int, width: int, layers: int, heads: int, pairs: int, vocabulary: int) -> None:
    """Print the arithmetic of a Llama of this shape in bfloat16, from one block of it, on tensors without values."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    print(config, layers)


if __name__ == "__main__":
    main()
