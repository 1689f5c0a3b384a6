"""Option groups that several `surgery` commands share, and what reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from chanfmt.base.errors import UsageError
from chanfmt.cli.framework import add_options


@dataclass(frozen=True)
class AtlasOptions:
    """Where the scores come from."""

    atlas: str = field(metadata={"help": "importance atlas of the model, a file or hf://REPO/FILE", "positional": "ATLAS"})


@dataclass(frozen=True)
class CutOptions:
    """What to cut, and where the result goes."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, directory or .gguf file of the model (default: the one the atlas names, from the Hub)",
            "metavar": "MODEL",
        },
    )
    revision: str | None = field(
        default=None,
        metadata={
            "help": "branch, tag or commit of the model on the Hub (default: the commit that the atlas was measured at)",
        },
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "output directory (default: MODEL-METHOD-PERCENT here)",
            "short": "-o",
            "metavar": "DIR",
        },
    )
    shard_size: str | None = field(
        default=None,
        metadata={
            "help": "largest size of a weights file, such as 5GB (default: files that correspond to the model's)",
            "metavar": "SIZE",
        },
    )
    no_verify: bool = field(
        default=False,
        metadata={
            "help": "do not compare logits with those of the masked dense model",
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the output where it is an earlier result"})


@dataclass(frozen=True)
class ResultsOptions:
    """Where an experiment's rows go."""

    output: str = field(
        metadata={
            "help": "directory for results.csv and results.json; rows that are there are not measured again",
            "short": "-o",
            "metavar": "DIR",
        }
    )
    overwrite: bool = field(default=False, metadata={"help": "drop the rows that are there"})


@dataclass(frozen=True)
class TalkOptions:
    """What is printed."""

    json: bool = field(default=False, metadata={"help": "print the result as JSON"})
    quiet: bool = field(default=False, metadata={"help": "print no progress"})


def add_command(commands: Any, name: str, summary: str, run: object, *options: type) -> None:
    """Add the subcommand ``name``, which calls ``run``, with the groups ``options``."""
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    for kind in options:
        add_options(parser, kind)
    parser.set_defaults(run=run)


def parse_size(text: str | None) -> int | None:
    """Bytes of a size as transformers writes it: ``5GB`` (decimal), ``500MB``, ``1GiB``. Raises `UsageError`."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:[.][0-9]+)?) ?([KMGT]?)(i?)B", text, re.IGNORECASE)
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise UsageError(f"--shard-size {text!r} is not a size", hint="write it like 5GB, 500MB or 1GiB")
    return size
