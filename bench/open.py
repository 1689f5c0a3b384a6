"""What opening a large atlas costs, warm. Prints medians in milliseconds beside their budgets.

    python bench/open.py [REPETITIONS]

Two atlases of random numbers are written to a temporary directory: a dense gated model of 32 x 14336
channels, and 48 layers of 128 experts with 768 channels each. Opening includes the check of the whole
structure.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import chanfmt
from chanfmt import schema
from chanfmt.labels import support_sizes
from chanfmt.records import (
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
from chanfmt.writer import write_atlas

if TYPE_CHECKING:
    from collections.abc import Callable

HIDDEN = 4096


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    with tempfile.TemporaryDirectory() as directory:
        print(f"{'atlas':<15} {'what':<42} {'median':>9} {'min':>9} {'budget':>9}")
        for name, layers, experts, channels, budget in (("32 x 14336", 32, 0, 14336, 20), ("48 x 128 x 768", 48, 128, 768, 100)):
            path = Path(directory) / "atlas.h5"
            write_atlas(random_content(layers, experts, channels), path)
            for what, limit, run in (
                ("open, check the structure", None, lambda path=path: open_only(path)),
                ("open, check, read one layer's metric", budget, lambda path=path: one_row(path)),
                ("open, check, read one metric", budget, lambda path=path: whole_metric(path)),
                ("xarray.open_datatree, h5netcdf", 1000, lambda path=path: datatree(path)),
            ):
                median, best = milliseconds(run, repetitions)
                print(f"{name:<15} {what:<42} {median:>6.1f} ms {best:>6.1f} ms {f'{limit} ms' if limit else '':>9}", flush=True)


def open_only(path: Path) -> None:
    chanfmt.open(path).close()


def one_row(path: Path) -> None:
    with chanfmt.open(path) as atlas:
        atlas.stacks["decoder"].row("lp", 5)


def whole_metric(path: Path) -> None:
    with chanfmt.open(path) as atlas:
        atlas.stacks["decoder"]["lp"]


def datatree(path: Path) -> None:
    import xarray

    xarray.open_datatree(path, engine="h5netcdf").close()


def milliseconds(run: Callable[[], None], repetitions: int) -> tuple[float, float]:
    """Median and minimum of ``repetitions`` runs after one that warms up."""
    run()
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times), min(times)


def random_content(layers: int, experts: int, channels: int) -> AtlasContent:
    """An atlas of the format's whole shape, with a tensor table as large as a real model's, and noise for values."""
    random = np.random.default_rng(0)
    kind = "experts" if experts else "dense"
    sequences, seq_len = 64, 512
    settings = LabelSettings()
    supports = support_sizes(HIDDEN, settings.support_size)
    lengths = {"layer": layers, "expert": experts, "channel": channels, "split": schema.SPLITS, "support": len(supports)}
    variables = {}
    for variable in schema.STACK_VARIABLES:
        shape = tuple(lengths[name] for name in schema.stack_dimensions(variable, kind))
        values = random.random(shape, dtype=np.float32)
        variables[variable.name] = values if variable.dtype.startswith("f") else (3 * values).astype(variable.dtype)
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
            schema.LOSSES["next-token"], schema.METRIC_DEFINITION, "none", seq_len, 0, 1.0,
            tuple(f"{index:064x}" for index in range(sequences)), np.zeros(sequences, dtype=np.int32),
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
