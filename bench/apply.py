"""Time and memory of a cut, compared with a copy of the checkpoint and with a cut by transformers.

    python bench/apply.py [--gigabytes 4.5] [--rounds 3] [--directory DIR]

The script makes a random Llama-shaped bfloat16 checkpoint in shards, and a plan that removes half of every FFN. Then it
runs these commands in turn, each in a process of its own. Before a command, the files are dropped from the page cache.
The time ends when the result is on the disk: it includes a sync of the file system.

- ``surgery apply --no-verify``, as a user runs it, with imports, checks of shapes and fsync;
- ``cp -r`` of the checkpoint;
- transformers, once: load the checkpoint, slice the modules, ``save_pretrained``.

The script prints seconds, peak resident memory, and their ratios.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from chanfmt.format.records import TensorSlice
from chanfmt.models.safetensors import CheckpointIndex, fingerprint
from surgery.planning.file import save_plan
from surgery.planning.plan import BlockPlan, PlannedModel, PruningPlan

HIDDEN, WIDTH, HEADS, VOCABULARY = 4096, 14336, 32, 32000
KEY_VALUE_HEADS = 8
SHARD_LAYERS = 4
LIBC = ctypes.CDLL(None)

WITH_TRANSFORMERS = """
import sys, torch, transformers
from safetensors.numpy import load_file
source, plan, output = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
kept = load_file(plan)
with torch.no_grad():
    for name, ids in kept.items():
        mlp, ids = model.get_submodule(name), torch.from_numpy(ids).long()
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight = torch.nn.Parameter(linear.weight[ids])
        mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, ids].contiguous())
model.config.intermediate_size = len(ids)
model.save_pretrained(output)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        model, plan = directory / "model", directory / "plan.safetensors"
        # In a process of its own, because every process that this process starts inherits its memory peak.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            layers = pool.submit(make_checkpoint, model, arguments.gigabytes).result()
        save_plan(make_plan(model, layers), plan)
        size = CheckpointIndex.open(model).nbytes
        group = 3 * HIDDEN * WIDTH * 2
        print(
            f"{layers} layers, {size / 1e9:.2f} GB in {len(list(model.glob('*.safetensors')))} shards; "
            f"largest FFN group {group / 1e6:.0f} MB; memory {os.sysconf('SC_PHYS_PAGES') * 4096 / 1e9:.0f} GB, "
            f"{os.cpu_count()} cores",
            flush=True,
        )
        commands = {
            "surgery apply": [
                sys.executable,
                "-m",
                "surgery.cli.main",
                "apply",
                str(plan),
                "--model",
                str(model),
                "-o",
                str(directory / "out"),
                "--no-verify",
                "--quiet",
            ],
            "cp -r": ["cp", "-r", str(model), str(directory / "out")],
        }
        results: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
        for _ in range(arguments.rounds):
            for name, command in commands.items():
                results[name].append(timed(command, directory))
                print(f"  {name}: {results[name][-1][0]:.1f} s, {results[name][-1][1] / 1e6:.0f} MB", flush=True)
        slow = timed([sys.executable, "-c", WITH_TRANSFORMERS, str(model), str(plan), str(directory / "out")], directory)
        print(f"  transformers: {slow[0]:.1f} s, {slow[1] / 1e6:.0f} MB", flush=True)
    ours, copy = (statistics.median(seconds for seconds, _ in results[name]) for name in commands)
    memory = max(peak for _, peak in results["surgery apply"])
    print(f"time:   ours / cp -r        {ours / copy:5.2f}   (at most 1.5)")
    print(f"        transformers / ours {slow[0] / ours:5.2f}   (at least 3)")
    print(f"memory: ours                {memory / 1e6:5.0f} MB (at most {(2 * group + 300e6) / 1e6:.0f})")
    print(f"        transformers / ours {slow[1] / memory:5.2f}   (at least 5)")


def make_checkpoint(directory: Path, gigabytes: float) -> int:
    """Write a checkpoint of about ``gigabytes``, shard by shard. Returns its number of layers."""
    import torch
    import transformers
    from safetensors.torch import save_file

    def config(layers: int) -> Any:
        return transformers.LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=KEY_VALUE_HEADS,
            vocab_size=VOCABULARY,
            dtype="bfloat16",
            architectures=["LlamaForCausalLM"],
        )

    def shapes(layers: int) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config(layers))
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def count(layers: int) -> int:
        return sum(int(np.prod(shape)) for shape in shapes(layers).values())

    layers = max(1, round((gigabytes * 1e9 / 2 - count(0)) / (count(1) - count(0))))
    directory.mkdir()
    names = shapes(layers)
    shards: dict[int, list[str]] = {}
    for name in names:
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        shards.setdefault(layer // SHARD_LAYERS, []).append(name)
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for number, tensors in enumerate(shards.values(), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(
            {name: torch.empty(names[name], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator) for name in tensors},
            directory / file,
            {"format": "pt"},
        )
        weight_map |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config(layers).save_pretrained(directory)
    return layers


def make_plan(model: Path, layers: int) -> PruningPlan:
    """Plan a cut that keeps a random half of every FFN."""
    random = np.random.default_rng(0)
    blocks = []
    for layer in range(layers):
        module = f"model.layers.{layer}.mlp"
        tensors = tuple(
            TensorSlice(role, name, name, axis, 0, WIDTH)
            for role, name, axis in (
                ("gate", f"{module}.gate_proj.weight", 0),
                ("up", f"{module}.up_proj.weight", 0),
                ("write", f"{module}.down_proj.weight", 1),
            )
        )
        kept = np.sort(random.permutation(WIDTH)[: WIDTH // 2]).astype(np.int32)
        blocks.append(BlockPlan(module, layer, "decoder", module, "decoder", WIDTH, 0, tensors, kept, 0, 0, None))
    record = PlannedModel("bench/apply", "", "local", "llama", ("LlamaForCausalLM",), fingerprint(CheckpointIndex.open(model)))
    return PruningPlan(
        model=record,
        method="random",
        protection=(),
        unprotect=(),
        protected=0,
        released=0,
        seed=0,
        sparsity=0.5,
        multiple_of=None,
        allocation="uniform",
        max_layer_sparsity=None,
        layers=None,
        stack=(),
        invert=False,
        scope_channels=layers * WIDTH,
        atlas_sha256="",
        calibration="",
        check_tokens=(),
        blocks=tuple(blocks),
    )


def timed(command: list[str], directory: Path) -> tuple[float, int]:
    """Run ``command`` with no file of ``directory`` in the page cache, and remove its output.

    Returns seconds until the output is on the disk, and peak resident memory in bytes.
    """
    drop_cache(directory)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    descriptor = os.open(directory, os.O_RDONLY)
    LIBC.syncfs(descriptor)
    os.close(descriptor)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"exit {process.returncode}: {' '.join(command[:5])}\n{said.decode()}")
    shutil.rmtree(directory / "out")
    return seconds, usage.ru_maxrss * 1024


def drop_cache(directory: Path) -> None:
    """Drop the weights in ``directory`` from the page cache."""
    os.sync()
    for path in directory.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()
