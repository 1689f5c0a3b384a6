"""`surgery restore`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.cli.framework import parse_options, print_json
from surgery.cli.options import TalkOptions, add_command, parse_size

if TYPE_CHECKING:
    import argparse


@dataclass(frozen=True)
class RestoreOptions:
    """What is restored, and where it goes."""

    directory: str = field(metadata={"help": "result of surgery prune or apply, trained since or not", "positional": "DIR"})
    output: str = field(metadata={"help": "output directory", "short": "-o", "metavar": "DIR"})
    shard_size: str | None = field(
        default=None,
        metadata={
            "help": "largest size of a weights file, such as 5GB (default: files that correspond to DIR's)",
            "metavar": "SIZE",
        },
    )
    no_verify: bool = field(default=False, metadata={"help": "do not compare logits with those of DIR"})
    overwrite: bool = field(default=False, metadata={"help": "replace the output where it is an earlier result"})


def add(commands: Any) -> None:
    add_command(
        commands,
        "restore",
        "put a cut model back into its full width, with zeros where channels were removed",
        _run,
        RestoreOptions,
        TalkOptions,
    )


def _run(arguments: argparse.Namespace) -> None:
    from chanfmt.hub.locate import locate_model
    from surgery.cut.options import CutOptions
    from surgery.cut.restore import restore

    options = parse_options(arguments, RestoreOptions)
    talk = parse_options(arguments, TalkOptions)
    output = Path(options.output)
    restored = restore(
        locate_model(options.directory),
        output,
        CutOptions(options.overwrite, not options.no_verify, shard_bytes=parse_size(options.shard_size)),
    )
    say(f"wrote {output}")
    if talk.json:
        print_json(restored.to_json() | {"output": str(output)})
