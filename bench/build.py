"""Cost of `atlas build`, compared with a bare loop and with the procedure of the paper. Prints ratios of one run.

    python bench/build.py [--model smollm2|8b] [--device cpu] [--sequences 16] [--seq-len 512] [--cpu-seconds] [--only NAME,...]

The contenders run side by side, batch by batch, on SmolLM2-135M (the environment variable SMOLLM2_GGUF names the file) or
on a random bfloat16 model with the shape of Llama-3.1-8B:

* bare, the floor: forward and activation-only backward of the same batches, with the same chunked loss;
* ours: the measuring pass, including redundancy and its null;
* paper, the procedure of arXiv 2604.23475 in an implementation of ours: gradients of all parameters, one sequence at a time,
  all logits at once, and a second pass for redundancy.

"Recompute" is the same pass over all batches, block by block with the weights in memory (`--memory recompute`). It runs by itself,
after the others.

Peak memory is measured after the model is loaded, in a process (on Linux) or on a GPU that does nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from chanfmt.building.capture import Capture
from chanfmt.building.statistics import FFNStatistics
from chanfmt.building.stream import measure_streamed
from chanfmt.data.text import read_text
from chanfmt.data.tokens import canonical, pack, sample, tokenize
from chanfmt.format.records import NO_SPECIAL_TOKENS, LabelSettings
from chanfmt.hub.locate import locate_model
from chanfmt.models.find.discover import find_ffns
from chanfmt.models.load import load_model
from chanfmt.models.next_token import NextTokenLoss
from chanfmt.models.run import usual_batch
from chanfmt.models.streaming.spool import Spool
from chanfmt.models.streaming.streamed import open_resident

if TYPE_CHECKING:
    from collections.abc import Callable

RHO = 0.01
CONTENDERS = ("bare", "ours", "paper")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=("smollm2", "8b"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--cpu-seconds", action="store_true", help="time that other work on the machine does not count in")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, with commas between")
    parser.add_argument("--memory-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(peak_memory(arguments)))
        return
    bench = Bench(arguments)
    print(
        f"{datetime.date.today()}  {hardware(arguments.device)}  torch {torch.__version__}  {arguments.model}, "
        f"{len(bench.ids)} x {arguments.seq_len} tokens in batches of {bench.batch}",
        flush=True,
    )
    seconds, recomputed = bench.race(), bench.recomputed()
    del bench
    memory = {name: memory_of(name) for name in seconds}
    tokens = arguments.sequences * arguments.seq_len
    for name in seconds:
        print(
            f"{name:<6} {sum(seconds[name]):8.2f} s  {tokens / sum(seconds[name]):8.0f} tokens/s  "
            f"peak {memory[name] / 2**20:8.0f} MiB"
        )
    if "bare" in seconds:
        print(f"recompute {recomputed:.2f} s: {recomputed / sum(seconds['bare']):.3f} of bare")
    for name, floor in (("ours", "bare"), ("paper", "ours")):
        if not {name, floor} <= seconds.keys():
            continue
        ratios = [a / b for a, b in zip(seconds[name], seconds[floor], strict=True)]
        print(
            f"{name} / {floor}: median {statistics.median(ratios):.3f} of {len(ratios)} batches "
            f"({min(ratios):.3f} to {max(ratios):.3f}), memory {memory[name] / memory[floor]:.2f}"
        )


class Bench:
    """A model, its batches, and the contenders as functions of a batch."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        self.model, self.ids = _model_and_tokens(arguments, self.device)
        self.batch = min(usual_batch(self.device, arguments.seq_len), arguments.sequences // 8 or 1)
        self.ffns = find_ffns(self.model)
        self.loss = NextTokenLoss(self.model, self.ids[:1])
        self.contenders: dict[str, Callable[[torch.Tensor], None]] = {}
        found = [FFNStatistics(ffn, self.device) for ffn in self.ffns]
        capture = Capture(self.model, self.ffns, found)

        def bare(ids: torch.Tensor) -> None:
            # A bare loop would start the gradient at the embeddings.
            handle = self.model.get_input_embeddings().register_forward_hook(lambda m, i, o: o.requires_grad_(True))
            self.loss.backward(ids)
            handle.remove()

        def ours(ids: torch.Tensor) -> None:
            capture.begin(len(ids), 0)
            with capture.running():
                self.loss.backward(ids)
            for item in found:
                if item.members[0].core is None:
                    for member in item.members:
                        member.choose_core(RHO)

        every = {"bare": bare, "ours": ours, "paper": Paper(self.model, self.ffns)}
        self.clock = time.process_time if arguments.cpu_seconds else time.perf_counter
        self.contenders = {name: every[name] for name in arguments.only.split(",")}

    def race(self) -> dict[str, list[float]]:
        """Run the contenders in turns. Returns the seconds of every contender for every batch."""
        for run in self.contenders.values():
            run(self.ids[: self.batch])
        seconds: dict[str, list[float]] = {name: [] for name in self.contenders}
        for start in range(0, len(self.ids), self.batch):
            for name, run in self.contenders.items():
                seconds[name].append(self.timed(run, self.ids[start : start + self.batch]))
        return seconds

    def recomputed(self) -> float:
        """Run the pass over all batches block by block. Returns seconds, without those of opening the model."""
        streamed, tokens = open_resident(self.model), canonical(self.ids.cpu().numpy())
        # The first batch chooses the core, as it does for "ours".
        splits = np.minimum(np.arange(len(tokens)) // self.batch, 1).astype(np.uint8)
        with Spool(4 << 30, Path.cwd()) as spool:
            return self.timed(
                lambda ids: measure_streamed(
                    streamed,
                    dataclasses.replace(tokens, split_of=splits),
                    spool,
                    settings=LabelSettings(rho=RHO),
                    loss=self.loss,
                    batch_size=self.batch,
                ),
                self.ids,
            )

    def timed(self, run: Callable[[torch.Tensor], object], ids: torch.Tensor) -> float:
        """Run a contender on ``ids`` (sequence, position). Returns seconds."""
        self._wait()
        began = self.clock()
        run(ids)
        self._wait()
        return self.clock() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Paper:
    """Module hooks, parameter gradients, batch size 1, and a second pass for redundancy."""

    def __init__(self, model: Any, ffns: list[Any]) -> None:
        self.model = model
        self.writes = [model.get_submodule(ffn.write.removesuffix(".weight")) for ffn in ffns]
        self.squares = [torch.zeros(ffn.width, device=model.device) for ffn in ffns]
        self.moments: list[torch.Tensor | None] = [None] * len(ffns)

    def __call__(self, ids: torch.Tensor) -> None:
        for row in ids:
            self.run(row[None], self.add_squares)
        for row in ids:
            self.run(row[None], self.add_moments)

    def run(self, ids: torch.Tensor, add: Callable[[int, torch.Tensor], None]) -> None:
        self.model.requires_grad_(True)
        captured: dict[int, torch.Tensor] = {}

        def forward(number: int, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            captured[number] = args[0]
            args[0].retain_grad()

        handles = [
            write.register_forward_pre_hook(lambda m, a, n=number: forward(n, m, a)) for number, write in enumerate(self.writes)
        ]
        logits = self.model(ids, use_cache=False).logits
        functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
        for number, u in captured.items():
            add(number, (u * u.grad)[0].detach().float())
        for handle in handles:
            handle.remove()
        self.model.zero_grad(set_to_none=True)
        self.model.requires_grad_(False)

    def add_squares(self, number: int, q: torch.Tensor) -> None:
        self.squares[number] += q.square().sum(0)

    def add_moments(self, number: int, q: torch.Tensor) -> None:
        core = self.squares[number].topk(max(1, int(RHO * q.shape[1]))).indices
        product = q.T @ q[:, core]
        before = self.moments[number]
        self.moments[number] = product if before is None else before + product


def peak_memory(arguments: argparse.Namespace) -> int:
    """Run one batch twice through one contender. Returns the peak memory of this process, or of the GPU, in bytes."""
    bench = Bench(arguments)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        # This resets VmHWM, so that loading does not count. The peak of getrusage cannot be reset.
        Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        bench.contenders[arguments.memory_of](bench.ids[: bench.batch])
    if bench.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return int(peak[1]) * 1024


def memory_of(name: str) -> int:
    """Measure `peak_memory` of the contender ``name`` in a process of its own."""
    done = subprocess.run([sys.executable, *sys.argv, "--memory-of", name], check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout.strip().splitlines()[-1]))


def hardware(device: str) -> str:
    """Name of the hardware that runs ``device``."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(0)
    return f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}"


def _model_and_tokens(arguments: argparse.Namespace, device: torch.device) -> tuple[Any, torch.Tensor]:
    if arguments.model == "smollm2":
        source = locate_model(os.environ["SMOLLM2_GGUF"])
        model = load_model(source, device=arguments.device)
        ids = tokenize(source.tokenizer, read_text("pydoc", "calibrate"))
        blocks = pack(ids, arguments.seq_len, NO_SPECIAL_TOKENS, "pydoc")
        return model, torch.from_numpy(sample(blocks, arguments.sequences, 0).ids).long().to(device)
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    return model, torch.randint(0, 128256, (arguments.sequences, arguments.seq_len), generator=generator).to(device)


if __name__ == "__main__":
    main()
