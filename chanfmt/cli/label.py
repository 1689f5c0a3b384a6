"""`atlas label`."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.cli import framework
from chanfmt.cli.options import AtlasOptions

if TYPE_CHECKING:
    import argparse

    from chanfmt.format.records import AtlasContent, LabelSettings


EXAMPLES = (
    "atlas label llama.h5 --rho 0.02 -o wider.h5",
    "atlas label llama.h5 --eta 0.2 --support 512 --model meta-llama/Llama-3.2-1B --overwrite",
)


@dataclass(frozen=True)
class LabelOutputOptions:
    """Which weights are read, and where the result goes."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "the measured model (Hub id, directory or .gguf file), to compute connectivity from its weights",
            "metavar": "MODEL",
            "kind": "model",
        },
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "atlas to write (with --overwrite, by default FILE itself)",
            "flag": "--output",
            "short": "-o",
            "metavar": "FILE",
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the output if it exists"})


def add(commands: Any) -> None:
    framework.add_command(
        commands,
        "label",
        "label the channels of an atlas with other settings",
        run=_run,
        options=_options,
        examples=EXAMPLES,
        description=("Label the channels of FILE again. Settings that are not given stay as they are in the file."),
    )


def _options() -> tuple[type, ...]:
    from chanfmt.format.records import LabelSettings

    kinds = typing.get_type_hints(LabelSettings)
    changes = dataclasses.make_dataclass(
        "LabelChanges",
        [
            (
                item.name,
                kinds[item.name] | None,
                field(default=None, metadata={**item.metadata, "help": f"{item.metadata['help']} (default: as in FILE)"}),
            )
            for item in dataclasses.fields(LabelSettings)
            if "help" in item.metadata
        ],
    )
    changes.__doc__ = LabelSettings.__doc__
    return AtlasOptions, changes, LabelOutputOptions


def _run(arguments: argparse.Namespace) -> int:
    from chanfmt.base.errors import UsageError
    from chanfmt.base.files import output_path
    from chanfmt.hub.names import is_address
    from chanfmt.hub.rewriting import SETTINGS, write_relabelled

    changes = {name: getattr(arguments, name) for name in SETTINGS if getattr(arguments, name) is not None}
    if not changes and arguments.model is None:
        raise UsageError(
            "no setting to change was given",
            hint="add --rho, --eta, --support, --alpha or --gamma, or name the weights with --model",
        )
    if arguments.output is None and is_address(arguments.file):
        raise UsageError(f"{arguments.file} is on the Hub", hint="add -o FILE for the result")
    if arguments.output is None and not arguments.overwrite:
        raise UsageError(
            "-o FILE is missing", hint=f"add -o FILE: atlas to write; or add --overwrite to replace {arguments.file} itself"
        )
    output = output_path(arguments.output or arguments.file)
    before, after, written = write_relabelled(
        arguments.file, output, changes, model=arguments.model, overwrite=arguments.overwrite
    )
    rows = _changes(before, after)
    say(f"wrote {output}; {sum(row['moved'] for row in rows):,} labels changed")
    if arguments.json:
        framework.print_json(
            {
                "file": str(output),
                "content_sha256": written,
                "labels": dataclasses.asdict(after.labels),
                "core_rho": after.core_rho,
                "dropped": list(after.dropped),
                "layers": rows,
            }
        )
    else:
        _print(rows, after.labels)
    return 0


def _changes(before: AtlasContent, after: AtlasContent) -> list[dict[str, Any]]:
    """One row per FFN, in model order: number of channels with each label, now and before."""
    from chanfmt.format import schema

    labels = [{stack.name: stack.variables["label"] for stack in content.stacks} for content in (before, after)]
    rows = []
    for block in after.blocks:
        old, new = (found[block.stack][block.row] for found in labels)
        row: dict[str, Any] = {"layer": block.layer_index, "stack": block.stack, "channels": int(new.size)}
        for name, value in (("supernodes", schema.LABEL_SUPERNODE), ("halo", schema.LABEL_HALO)):
            row |= {name: int((new == value).sum()), f"{name}_before": int((old == value).sum())}
        rows.append(row | {"moved": int((old != new).sum())})
    return rows


def _print(rows: list[dict[str, Any]], settings: LabelSettings) -> None:
    several = len({row["stack"] for row in rows}) > 1
    headings = [
        "layer",
        *(["stack"] if several else []),
        "channels",
        f"top {settings.rho * 100:.3g}%",
        "before",
        "halo",
        "before",
        "changed",
    ]
    framework.print_table(
        headings,
        [
            [
                str(row["layer"]),
                *([row["stack"]] if several else []),
                f"{row['channels']:,}",
                str(row["supernodes"]),
                str(row["supernodes_before"]),
                str(row["halo"]),
                str(row["halo_before"]),
                str(row["moved"]),
            ]
            for row in rows
        ],
    )
