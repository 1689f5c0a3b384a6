"""`surgery restore`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.cli.framework import PrintOptions, add_command, parse_options, print_json
from surgery.cli.options import parse_size

if TYPE_CHECKING:
    import argparse

EXAMPLES = (
    "surgery restore llama-half -o llama-full-width",
    "surgery restore ./tuned --kept llama-half -o tuned-full-width --shard-size 5GB",
)


@dataclass(frozen=True)
class RestoreOptions:
    """What is restored, and where the result goes."""

    directory: str = field(
        metadata={"help": "result of surgery prune or apply; it may have been trained since", "positional": "DIR"}
    )
    kept: str | None = field(
        default=None,
        metadata={
            "help": "result that DIR was trained from, or its kept_channels.safetensors (default: the one in DIR)",
            "metavar": "RESULT",
        },
    )
    output: str = field(
        kw_only=True, metadata={"help": "directory to write", "flag": "--output", "short": "-o", "metavar": "DIR"}
    )
    shard_size: str | None = field(
        default=None,
        metadata={
            "help": "largest size of a weights file, such as 5GB (default: one output file for each file of DIR)",
            "metavar": "SIZE",
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "round the result's floating tensors: float32, bfloat16, float16 (default: as stored)",
        },
    )
    no_verify: bool = field(default=False, metadata={"help": "do not compare logits with those of DIR"})
    overwrite: bool = field(default=False, metadata={"help": "replace the output if it is an earlier result"})


def add(commands: Any) -> None:
    add_command(
        commands,
        "restore",
        "give a cut model its full width back, with zeros for removed channels",
        run=_run,
        options=lambda: (RestoreOptions,),
        examples=EXAMPLES,
        description=("Write a cut model at its original width again, with zeros in place of the channels that were removed."),
    )


def _run(arguments: argparse.Namespace) -> None:
    from chanfmt.base.files import output_path
    from chanfmt.hub.locate import locate_model
    from surgery.cut.apply import check_output
    from surgery.cut.options import CutOptions
    from surgery.cut.restore import restore

    options = parse_options(arguments, RestoreOptions)
    talk = parse_options(arguments, PrintOptions)
    output = output_path(options.output)
    # The result may be on the Hub. A fault in the options should show before a download.
    cut_options = CutOptions(
        options.overwrite, not options.no_verify, shard_bytes=parse_size(options.shard_size), dtype=options.dtype
    )
    cut_options.check()
    check_output(output, overwrite=options.overwrite)
    restored = restore(locate_model(options.directory), output, cut_options, kept=options.kept)
    say(f"wrote {output}")
    if talk.json:
        print_json(restored.to_json() | {"output": str(output)})
