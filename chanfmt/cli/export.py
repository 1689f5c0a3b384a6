"""`atlas export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.cli import framework
from chanfmt.cli.options import AtlasOptions

if TYPE_CHECKING:
    import argparse


EXAMPLES = (
    "atlas export llama.h5 -o llama.parquet",
    "atlas export llama.h5 -o lp.csv --metrics lp,x_lab/hessian",
    "atlas export llama.h5 -o llama.imatrix.gguf",
)


@dataclass(frozen=True)
class ExportOptions:
    """Where the result goes, and what it holds."""

    output: str = field(
        metadata={
            "help": "file to write: .parquet, .csv and .arrow hold one row per channel, .npz, .json and .safetensors hold the arrays, .gguf is llama.cpp's importance matrix",
            "flag": "--output",
            "short": "-o",
            "metavar": "OUT",
        }
    )
    metrics: str | None = field(
        default=None, metadata={"help": "write only these variables, and the labels (default: all)", "metavar": "A,B"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the output if it exists"})


def add(commands: Any) -> None:
    framework.add_command(
        commands,
        "export",
        "write an atlas as parquet, csv, arrow, npz, json, safetensors or imatrix",
        run=_run,
        options=lambda: (AtlasOptions, ExportOptions),
        examples=EXAMPLES,
        description=(
            "Write the channels of an atlas as a table, or its arrays, for programs that do not read HDF5, or as the importance matrix that llama-quantize reads."
        ),
    )


def _run(arguments: argparse.Namespace) -> int:
    from chanfmt.algebra.export import IMATRIX, TABLES, export, export_format
    from chanfmt.base.files import output_path
    from chanfmt.hub.locate import open_atlas

    output = output_path(arguments.output)
    kind = export_format(output)
    metrics = None if arguments.metrics is None else [name.strip() for name in arguments.metrics.split(",")]
    with open_atlas(arguments.file, contained=True) as atlas:
        count = export(atlas, output, metrics=metrics, overwrite=arguments.overwrite)
    size = output.stat().st_size
    items = "rows" if kind in TABLES else "entries" if kind == IMATRIX else "arrays"
    say(f"wrote {output}: {count:,} {items}, {size / 1e6:,.1f} MB")
    if arguments.json:
        framework.print_json({"file": str(output), "format": kind, items: count, "bytes": size})
    return 0
