"""`atlas push`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.cli import framework

if TYPE_CHECKING:
    import argparse


EXAMPLES = (
    "atlas push llama.h5 llama-atlas",
    "atlas push llama.h5 USER/llama-atlas --public",
)


@dataclass(frozen=True)
class PushedOptions:
    """Which atlas, and where it goes."""

    file: str = field(metadata={"help": "atlas: a file, or hf://REPO/FILE", "positional": "FILE", "kind": "atlas"})
    repo: str = field(metadata={"help": "USER/NAME, or NAME for a repository of yours", "positional": "REPO", "kind": "name"})


def add(commands: Any) -> None:
    framework.add_command(
        commands,
        "push",
        "publish an atlas on the Hugging Face Hub",
        run=_run,
        options=_options,
        examples=EXAMPLES,
        description=(
            "Publish FILE with a card as the data set REPO, private unless --public, and read it back. After an interruption, "
            "run the same command again: it uploads what is missing."
        ),
    )


def _options() -> tuple[type, ...]:
    from chanfmt.hub.publish import PublishOptions

    return PushedOptions, PublishOptions


def _run(arguments: argparse.Namespace) -> int:
    from chanfmt.cli.info import layer_rows, layer_table
    from chanfmt.hub.atlases import check_valid, publish_atlas
    from chanfmt.hub.locate import locate_atlas, open_atlas
    from chanfmt.hub.names import check_repo
    from chanfmt.hub.publish import PublishOptions

    check_repo(arguments.repo)
    path = locate_atlas(arguments.file).path
    check_valid(path, arguments.file)
    with open_atlas(path, contained=True) as atlas:
        options = framework.parse_options(arguments, PublishOptions)
        if options.public and atlas.calibration.token_ids is not None:
            say("note: the file holds the token ids of its calibration text; atlas strip leaves them out")
        done, place = publish_atlas(atlas, arguments.repo, layer_table(atlas, layer_rows(atlas)), options)
    say(f"published and read back; use it as: {place}")
    if arguments.json:
        framework.print_json({"repo": done.repo, "url": done.url, "commit": done.commit, "address": str(place)})
    else:
        framework.print_line(done.url)
    return 0
