"""Time and memory of writing a cut as a GGUF file, compared with a copy of the source file.

    python bench/write_gguf.py [--layers 2] [--kind Q8_0] [--directory DIR]

The script makes a random Llama-shaped GGUF file (FFNs only, 4096 x 14336), its dequantised checkpoint, and a checkpoint with
half of the channels. Then it runs, each in a process of its own: an import of everything, the writing of the GGUF file (decide,
copy, quantise, fsync), the writing of a GGUF file from the checkpoints alone, and ``cp`` of the source. It prints seconds, bytes, and peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import gguf
import numpy as np

HIDDEN, WIDTH, KEPT = 4096, 14336, 7168
ROLES = {
    "gate": ("gate_proj", (WIDTH, HIDDEN), 0),
    "up": ("up_proj", (WIDTH, HIDDEN), 0),
    "down": ("down_proj", (HIDDEN, WIDTH), 1),
}

WRITE = """
import json, resource, sys, time
from pathlib import Path
import numpy as np
from chanfmt.format.records import TensorSlice
from chanfmt.models.gguf_header import read_header
from chanfmt.models.safetensors import CheckpointIndex
from chanfmt.models.source import ModelSource
from surgery.cut.checkpoint.cuts import plan_cuts
from surgery.cut.gguf.convert import lay_out_converted
from surgery.cut.gguf.layout import lay_out
from surgery.cut.gguf.metadata import narrowed
from surgery.cut.gguf.write import write_gguf
from surgery.planning.plan import BlockPlan, PlannedModel, PruningPlan
home, layers, width, kept, run = Path(sys.argv[1]), *map(int, sys.argv[2:6])
kind = sys.argv[6]
import gguf, torch, transformers
if run == 2:
    source, written = ModelSource(home / "before"), ModelSource(home / "after")
    layout, header = lay_out_converted(source, written, {}, quant=kind.lower())
    write_gguf(None, header, layout, header.values, written.index, home / "converted.gguf")
if run == 1:
    ids = np.arange(0, width, width // kept, dtype=np.int32)
    axes = {"gate": ("gate_proj", 0), "up": ("up_proj", 0), "write": ("down_proj", 1)}
    blocks = []
    for layer in range(layers):
        name = f"model.layers.{layer}.mlp"
        items = tuple(
            TensorSlice(role, f"{name}.{part}.weight", f"{name}.{part}.weight", axis, 0, width, 1) for role, (part, axis) in axes.items()
        )
        blocks.append(BlockPlan(name, layer, "decoder", name, "decoder", width, 0, items, ids, 0, 0, None))
    model = PlannedModel("bench", "", "gguf", "llama", (), "0" * 64)
    plan = PruningPlan(
        model=model, method="random", protection=(), unprotect=(), protected=0, released=0, seed=0, sparsity=0.5, multiple_of=None,
        allocation="uniform", max_layer_sparsity=None, layers=None, stack=(), invert=False, scope_channels=layers * width,
        atlas_sha256="0" * 64, blocks=tuple(blocks),
        calibration="", check_tokens=(),
    )
    before, after = CheckpointIndex.open(home / "before"), CheckpointIndex.open(home / "after")
    widths = {block.name: kept for block in blocks}
    source, header = home / "in.gguf", read_header(home / "in.gguf")
    layout = lay_out(source, header, plan, plan_cuts(plan, widths, before), before, after)
    write_gguf(source, header, layout, narrowed(header, layout, plan, widths, "bench"), after, home / "out.gguf")
print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--kind", default="Q8_0")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        home = Path(name)
        # In a process of its own, because every process that this process starts inherits its memory peak.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(make, home, arguments.layers, arguments.kind).result()
        size = (home / "in.gguf").stat().st_size
        names = ("imports", "write", "convert")
        rows = [(name, *run(home, arguments.layers, number, arguments.kind)) for number, name in enumerate(names)]
        start = time.monotonic()
        subprocess.run(["cp", home / "in.gguf", home / "copy.gguf"], check=True)
        os.sync()
        rows.append(("cp", time.monotonic() - start, 0))
        result = (home / "out.gguf").stat().st_size
    group = sum(4 * np.prod(shape, dtype=np.int64) for _, shape, _ in ROLES.values())
    print(
        f"{arguments.layers} layers, {arguments.kind}: {size / 1e6:,.0f} to {result / 1e6:,.0f} MB; one FFN in float32 {group / 1e6:,.0f} MB"
    )
    for what, seconds, peak in rows:
        print(f"{what:<8} {seconds:6.1f} s  {f'{peak / 1e6:6.0f} MB peak' if peak else ''}")


def run(home: Path, layers: int, write: int, kind: str) -> tuple[float, int]:
    start = time.monotonic()
    command = [sys.executable, "-c", WRITE, str(home), *map(str, (layers, WIDTH, KEPT, write)), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.monotonic() - start, json.loads(done.stdout)["peak"]


def make(home: Path, layers: int, name: str) -> None:
    """Write the GGUF file and the two float32 checkpoints, a matrix at a time."""
    random, kind = np.random.default_rng(0), gguf.GGMLQuantizationType[name]
    writer = gguf.GGUFWriter(home / "in.gguf", "llama", use_temp_file=True)
    writer.add_name("bench")
    writer.add_block_count(layers)
    writer.add_feed_forward_length(WIDTH)
    for part in ("before", "after"):
        (home / part).mkdir()
    ids = np.arange(0, WIDTH, WIDTH // KEPT)
    headers: dict[str, dict[str, object]] = {"before": {}, "after": {}}
    for layer in range(layers):
        for role, (part, shape, axis) in ROLES.items():
            stored = gguf.quants.quantize(random.standard_normal(shape, dtype=np.float32) * 0.02, kind)
            writer.add_tensor(f"blk.{layer}.ffn_{role}.weight", stored, raw_dtype=kind)
            values = gguf.quants.dequantize(stored, kind)
            for where, array in (("before", values), ("after", values.take(ids, axis=axis))):
                path = home / where / "data"
                start = path.stat().st_size if path.exists() else 0
                with path.open("ab") as file:
                    file.write(array.tobytes())
                headers[where][f"model.layers.{layer}.mlp.{part}.weight"] = {
                    "dtype": "F32", "shape": list(array.shape), "data_offsets": [start, start + array.nbytes]
                }  # fmt: skip
    for where, header in headers.items():
        raw = json.dumps(header).encode()
        with (home / where / "model.safetensors").open("wb") as file, (home / where / "data").open("rb") as data:
            file.write(len(raw).to_bytes(8, "little") + raw)
            while piece := data.read(1 << 24):
                file.write(piece)
        (home / where / "data").unlink()
        config = {"model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": layers, "tie_word_embeddings": True}
        (home / where / "config.json").write_text(json.dumps(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
