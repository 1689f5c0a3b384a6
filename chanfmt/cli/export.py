"""`atlas export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say

if TYPE_CHECKING:
    import argparse


def add(commands: Any) -> None:
    parser = commands.add_parser("export", help="an atlas as parquet, csv, npz or json")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument(
        "-o",
        dest="output",
        metavar="OUT",
        required=True,
        help="file to write; .parquet and .csv hold a row per channel, .npz and .json the arrays",
    )
    parser.add_argument("--metrics", metavar="A,B", help="write only these variables beside the labels")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from chanfmt.algebra.export import TABLES, export, export_format
    from chanfmt.hub.locate import open_atlas

    output = Path(arguments.output)
    kind = export_format(output)
    metrics = None if arguments.metrics is None else [name.strip() for name in arguments.metrics.split(",")]
    with open_atlas(arguments.file, contained=True) as atlas:
        count = export(atlas, output, metrics=metrics, overwrite=arguments.overwrite)
    say(f"wrote {output}: {count:,} {'rows' if kind in TABLES else 'arrays'}, {output.stat().st_size / 1e6:,.1f} MB")
    return 0
