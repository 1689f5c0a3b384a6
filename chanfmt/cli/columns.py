"""`atlas import`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import UsageError
from chanfmt.base.narrate import say
from chanfmt.cli import framework
from chanfmt.cli.options import AtlasOptions, OutputOptions

if TYPE_CHECKING:
    import argparse

    import numpy as np

    from chanfmt.format.records import AtlasContent


EXAMPLES = (
    "atlas import llama.h5 --column x_lab/hessian=h.npy --units nats -o more.h5",
    "atlas import llama.h5 --column x_common/sae_feature=sae.csv -o more.h5",
)


@dataclass(frozen=True)
class ColumnOptions:
    """Which columns are added."""

    column: tuple[str, ...] = field(
        metadata={
            "help": "column to add and the file that holds it: .npy, .npz or .safetensors with an array (layer, channel), or .csv, "
            ".parquet or .arrow with the columns layer and channel; repeat for more",
            "metavar": "x_OWNER/NAME=FILE",
            "repeat": True,
        }
    )
    units: str | None = field(
        default=None, metadata={"help": "units of the columns, such as nats (default: 1)", "metavar": "UNITS"}
    )
    description: str | None = field(
        default=None, metadata={"help": "what the columns are, in one line (default: their names)", "metavar": "TEXT"}
    )
    merge: str | None = field(
        default=None,
        metadata={
            "help": "what a merge does with the columns: sum and max combine them, equal keeps them if all atlases agree, drop leaves "
            "them out (default: equal)",
            "metavar": "RULE",
        },
    )
    replace: bool = field(default=False, metadata={"help": "replace a column that FILE has already"})


def add(commands: Any) -> None:
    framework.add_command(
        commands,
        "import",
        "add numbers of another program to an atlas",
        run=_run,
        options=lambda: (AtlasOptions, ColumnOptions, OutputOptions),
        examples=EXAMPLES,
        description=(
            "Write FILE again with further columns: one number per channel, made by another program. atlas show lists them, --protect "
            "top:x_OWNER/NAME=2% selects by them, and atlas export writes them."
        ),
    )


def _run(arguments: argparse.Namespace) -> int:
    from chanfmt.algebra.column_files import read_column
    from chanfmt.algebra.columns import About, check_name, with_columns
    from chanfmt.algebra.rewrite import noted
    from chanfmt.base.claims import claimed
    from chanfmt.base.files import check_target, output_path
    from chanfmt.base.inputs import input_path
    from chanfmt.format.writer import write_atlas
    from chanfmt.hub.locate import open_atlas

    named = {}
    for text in arguments.column:
        name, separator, file = text.partition("=")
        if not separator or not file:
            raise UsageError(f"--column {text[:80]!r} names no file", hint="write it as x_OWNER/NAME=FILE")
        check_name(name)
        if name in named:
            raise UsageError(f"--column names {name} twice", hint="leave out one of them")
        named[name] = input_path(file)
    about = About(arguments.units, arguments.description, arguments.merge)
    about.check()
    output = output_path(arguments.output)
    check_target(output, overwrite=arguments.overwrite)
    # Verify first: a damaged file must not get a new, valid digest.
    with claimed(output), open_atlas(arguments.file, verify=True, contained=True) as atlas:
        content = atlas.content()
        found = {name: read_column(path, name, content.stacks) for name, path in named.items()}
        # A file's directory says nothing about the column.
        files = {name: path.name for name, path in named.items()}
        content = noted(
            with_columns(content, found, about, replace=arguments.replace),
            "import",
            [atlas.content_sha256],
            [atlas.hub_source],
            columns=files,
        )
        digest = write_atlas(content, output, overwrite=arguments.overwrite)
    rows = _rows(content, found)
    say(f"wrote {output}: {', '.join(found)}; a merge {_merging(rows)}")
    if arguments.json:
        framework.print_json({"file": str(output), "content_sha256": digest, "columns": rows})
    else:
        headings = ["column", "stack", "type", "units", "merge", "known"]
        framework.print_table(
            headings,
            [[*(str(row[name]) for name in headings[:-1]), f"{row['known']:,} of {row['channels']:,}"] for row in rows],
        )
    return 0


def _rows(content: AtlasContent, found: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """One row for each column and stack."""
    from numpy import isnan

    groups = {group.path: group for group in content.extensions}
    rows = []
    for name, arrays in found.items():
        owner, _, own = name.partition("/")
        for stack in arrays:
            [item] = [item for item in groups[f"{owner}/{stack}"].variables if item.name == own]
            row = {"column": name, "stack": stack, "type": f"{item.values.dtype.kind}{item.values.dtype.itemsize}"}
            known = int((~isnan(item.values)).sum()) if item.values.dtype.kind == "f" else item.values.size
            rows.append(row | {"units": item.units, "merge": item.merge, "known": known, "channels": item.values.size})
    return rows


_MERGING = {
    "sum": "adds them up",
    "max": "takes the larger value",
    "equal": "keeps them if all atlases have the same values",
    "drop": "leaves them out",
}


def _merging(rows: list[dict[str, Any]]) -> str:
    """What a merge does with the columns of ``rows``, in words."""
    return ", or ".join(_MERGING[rule] for rule in dict.fromkeys(row["merge"] for row in rows))
