"""Predicted against measured peak memory of a pass on CPUs: ``python bench/memory.py [SHAPE ...]``.

Each shape runs in a process of its own, with its whole graph and block by block: a random float32 model with random tokens, or
SmolLM2-135M (the environment variable SMOLLM2_GGUF names the file). The prediction is the one that `atlas build` chooses the
order of the pass and its batch from, without its margin. "Pass"
compares what the pass adds to the resident set, "process" the whole resident set. A ratio above 1 says that more was predicted
than measured. Linux only.

In the measured pass, glibc gives back freed memory at once, as `atlas build` lets it do where memory is short. "Reused" is what
the same pass adds if glibc reuses freed memory, which is faster and leaves gaps. "Seconds" is what that pass takes.

    python bench/memory.py --computed     the arithmetic for Llama-3.1-8B and Llama-3-70B; nothing is measured
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from chanfmt.building.measure import measure
from chanfmt.building.memory_probe import probe_in_memory, probe_streamed
from chanfmt.building.predicted_memory import Prediction, Stage, fitted, predicted
from chanfmt.building.statistics import ChannelStatistics
from chanfmt.building.stream import measure_streamed
from chanfmt.data.tokens import CalibrationTokens, canonical
from chanfmt.format.records import LabelSettings
from chanfmt.hub.locate import locate_model
from chanfmt.models.find.discover import find_ffns
from chanfmt.models.likelihood import nll
from chanfmt.models.live_bytes import LiveBytes
from chanfmt.models.load import load_model
from chanfmt.models.next_token import NextTokenLoss
from chanfmt.models.source import ModelSource
from chanfmt.models.streaming.parameters import freed_memory_returned
from chanfmt.models.streaming.spool import Spool
from chanfmt.models.streaming.streamed import StreamedModel, open_resident, open_streamed

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
HEADINGS = ("batch", "sums", "kept", "working", "predicted", "measured", "pass", "process", "reused", "seconds")
WHOLE, RECOMPUTE = "whole", "recompute"
LARGE = {"Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256), "Llama-3-70B": (8192, 28672, 80, 64, 8, 128256)}
"""Hidden size, width, blocks, heads, heads of keys and values, vocabulary."""
PROBED = (128, 256, 512)
SEQ_LEN = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--computed", action="store_true")
    parser.add_argument("--one", choices=("tight", "reused"), help=argparse.SUPPRESS)
    parser.add_argument("--order", choices=(WHOLE, RECOMPUTE), default=WHOLE, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.computed:
        for name, shape in LARGE.items():
            computed(name, *shape)
        return
    if arguments.one:
        print(json.dumps(run(arguments.shapes[0], arguments.order, tight=arguments.one == "tight")))
        return
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, {torch.get_num_threads()} thread(s); MB of 1e6 bytes")
    print(f"{'shape':22}" + "".join(f"{heading:>10}" for heading in HEADINGS), flush=True)
    for name in arguments.shapes or SHAPES:
        if name == "smollm2" and "SMOLLM2_GGUF" not in os.environ:
            print(f"{name:22} left out: SMOLLM2_GGUF names no file")
            continue
        for order in (WHOLE,) if name == "streamed" else (WHOLE, RECOMPUTE):
            _compare(name, order)


def _compare(name: str, order: str) -> None:
    """Print the line of one shape in one order."""
    found, reused = (_found(name, order, how) for how in ("tight", "reused"))
    measured = found["peak"] - found["before"]
    megabytes = (
        found["statistics"] + found["weights"] + found["spool"],
        found["activations"],
        found["working"],
        found["estimate"],
        measured,
    )
    ratios = (found["estimate"] / measured, (found["before"] + found["estimate"]) / found["peak"])
    print(
        f"{name if order == WHOLE else f'{name}, {order}':22}{SHAPES[name][2]:>3} x {SHAPES[name][3]:<4}"
        + "".join(f"{nbytes / 1e6:>10.0f}" for nbytes in megabytes)
        + "".join(f"{ratio:>10.2f}" for ratio in ratios)
        + f"{(reused['peak'] - reused['before']) / 1e6:>10.0f}{reused['seconds']:>10.1f}",
        flush=True,
    )


def _found(name: str, order: str, how: str) -> dict[str, float]:
    """What `run` returns in a process of its own."""
    command = [sys.executable, __file__, name, "--order", order, "--one", how]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(name: str, order: str, *, tight: bool) -> dict[str, float]:
    """Predict and measure the shape called ``name`` in this process. Returns bytes by name, and the seconds of the pass.

    Args:
        order: `WHOLE` or `RECOMPUTE`.
        tight: Whether glibc gives back freed memory at once. A streamed pass always lets it.
    """
    kind, fields, sequences, length = SHAPES[name]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        if not kind:
            source = locate_model(os.environ["SMOLLM2_GGUF"], revision=None, trust_remote_code=False)
            model: Any = load_model(source, device="cpu")
        else:
            config = getattr(transformers, kind)(**LLAMA | fields)
            model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        tokens = _tokens(sequences, length, model.config.vocab_size)
        if name == "streamed":
            model.save_pretrained(directory)
            del model
            return _by_block(open_streamed(ModelSource(directory), device="cpu"), tokens, sequences, Path(directory))
        with freed_memory_returned() if tight else contextlib.nullcontext():
            if order == RECOMPUTE:
                return _by_block(open_resident(model), tokens, sequences, Path(directory))
            return _in_memory(model, tokens, sequences)


def _in_memory(model: Any, tokens: CalibrationTokens, sequences: int) -> dict[str, float]:
    ffns, loss = find_ffns(model), NextTokenLoss(model, tokens.batch(0, 1, model))
    stages = probe_in_memory(model, ffns, tokens, rho=RHO, loss=loss)
    found, before, began = predicted(stages["cpu"], sequences, tokens.seq_len), _begin(), time.perf_counter()
    measure(model, ffns, tokens, rho=RHO, loss=loss, batch_size=sequences)
    return _result(found, before, began)


def _by_block(streamed: StreamedModel, tokens: CalibrationTokens, sequences: int, directory: Path) -> dict[str, float]:
    loss = NextTokenLoss(streamed.chain.model, tokens.batch(0, 1, streamed.chain.model))
    limit = 1 << 30
    stages = probe_streamed(streamed, tokens, rho=RHO, loss=loss, spool_limit=limit)
    found, before, began = predicted(stages["cpu"], sequences, tokens.seq_len), _begin(), time.perf_counter()
    with Spool(limit, directory) as spool:
        measure_streamed(streamed, tokens, spool, settings=LabelSettings(rho=RHO), loss=loss, batch_size=sequences)
    return _result(found, before, began)


def _tokens(sequences: int, length: int, vocabulary: int) -> CalibrationTokens:
    """Random tokens for three full batches: one before the core is chosen, and two after it."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (3 * sequences, length), dtype=np.int32)
    return dataclasses.replace(canonical(ids), split_of=np.repeat(np.arange(3, dtype=np.uint8), sequences))


def _begin() -> int:
    """Let the peak of the resident set begin anew. Returns the resident set in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _result(found: Prediction, before: int, began: float) -> dict[str, float]:
    seconds = time.perf_counter() - began
    return {
        **dataclasses.asdict(found),
        "estimate": found.estimate,
        "before": before,
        "peak": _status("VmHWM"),
        "seconds": seconds,
    }


def _status(name: str) -> int:
    line = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line is not None
    return int(line[1]) * 1024


def computed(name: str, hidden: int, width: int, blocks: int, heads: int, pairs: int, vocabulary: int) -> None:
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
    )
    # On the CPU, unlike the meta device, attention is fused, as it is on a GPU.
    with FakeTensorMode(allow_non_fake_inputs=True):
        _computed(name, config, blocks)


def _computed(name: str, config: Any, blocks: int) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    around = sum(parameter.nbytes for parameter in model.parameters())
    block = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    sums = ChannelStatistics(config.intermediate_size, config.hidden_size, torch.device("cpu"))
    count = sums.candidate_count(RHO)
    sums.set_core(torch.empty(count, dtype=torch.int64))
    statistics = sums.nbytes + 4 * count * (SEQ_LEN + 4)
    kept, peak = zip(*(_block_bytes(model, sums, length) for length in PROBED), strict=True)
    working = fitted(PROBED, [top - held for top, held in zip(peak, kept, strict=True)], pairs=False)
    loss = NextTokenLoss.__new__(NextTokenLoss)
    loss.head = model.lm_head
    row = _head_bytes(loss)
    whole = Stage(0, 0, 0, fitted(PROBED, kept), working, row, loss.rows_at_once)
    print(f"\n{name}, bfloat16, sequences of {SEQ_LEN} tokens: computed, not measured (GB of 1e9 bytes, without margin)")
    print(
        f"  {whole.kept.per_token / 1e3:.0f} kB of activations per token and block, {whole.kept.per_pair:.0f} bytes per pair of tokens"
    )
    for sequences in (1, 8, 32):
        one = whole.at(sequences, SEQ_LEN)
        _lines(
            f"in memory, batch of {sequences}",
            {
                "weights": around + (blocks - 1) * block,
                "statistics": blocks * statistics,
                "activations of all blocks": blocks * one.activations,
                "logits, or work of a block": one.working,
            },
        )
        _lines(
            f"recomputed, batch of {sequences}",
            {
                "weights": around + (blocks - 1) * block,
                "statistics of a block": statistics,
                "activations of a block": one.activations,
                "logits, or work of a block": one.working,
            },
        )
        _lines(
            f"streamed, batch of {sequences}",
            {
                "embeddings and output matrix": around - block,
                "weights of a block": block,
                "statistics of a block": statistics,
                "activations of a block": one.activations,
                "logits, or work of a block": one.working,
            },
        )


def _lines(title: str, parts: dict[str, int]) -> None:
    print(f"  {title:44}{sum(parts.values()) / 1e9:>8.2f}")
    for what, nbytes in parts.items():
        print(f"      {what:40}{nbytes / 1e9:>8.2f}")


def _block_bytes(model: Any, sums: ChannelStatistics, length: int) -> tuple[int, int]:
    """Bytes that the one block of ``model`` keeps for the backward pass of a sequence, and the peak."""
    assert sums.core is not None
    sums.core.last = None
    layer = model.model.layers[0]

    def write(module: Any, args: Any) -> None:
        args[0].register_hook(partial(back, args[0].detach()))

    def back(u: torch.Tensor, s: torch.Tensor) -> None:
        sums.add(u, s, 1)

    handle = layer.mlp.down_proj.register_forward_pre_hook(write)
    hidden = torch.empty(1, length, model.config.hidden_size, dtype=torch.bfloat16)
    positions = torch.arange(length)[None]
    around = tuple(torch.empty(1, length, layer.self_attn.head_dim, dtype=torch.bfloat16) for _ in range(2))
    with LiveBytes() as counted:
        state = hidden.clone().requires_grad_(True)
        output = layer(state.clone(), position_embeddings=around, attention_mask=None, position_ids=positions)
        output = output[0] if isinstance(output, tuple) else output
        kept = counted.live["cpu"]
        output.backward(torch.zeros_like(output))
    handle.remove()
    return kept, counted.peak["cpu"]


def _head_bytes(loss: NextTokenLoss, rows: int = 16) -> float:
    """Bytes of one row of logits with what belongs to it."""
    weight = loss.head.weight
    part = torch.empty(rows, weight.shape[1], dtype=weight.dtype, requires_grad=True)
    with LiveBytes() as counted:
        nll(loss.head(part), torch.zeros(rows, dtype=torch.int64)).backward()
    return counted.peak["cpu"] / rows


if __name__ == "__main__":
    main()
