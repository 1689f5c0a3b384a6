"""`atlas pull`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.cli import framework
from chanfmt.cli.options import OutputOptions

if TYPE_CHECKING:
    import argparse


EXAMPLES = (
    "atlas pull USER/llama-atlas -o llama.h5",
    "atlas pull USER/atlases@main small.h5 -o small.h5 --overwrite",
)


@dataclass(frozen=True)
class PullOptions:
    """Which atlas."""

    repo: str = field(metadata={"help": "USER/NAME, USER/NAME@REVISION, or an address hf://...", "positional": "REPO"})
    file: str | None = field(
        default=None, metadata={"help": "file in REPO (default: its only .h5 file)", "positional": "FILE", "nargs": "?"}
    )


def add(commands: Any) -> None:
    framework.add_command(
        commands,
        "pull",
        "download an atlas from the Hugging Face Hub",
        run=_run,
        options=lambda: (PullOptions, OutputOptions),
        examples=EXAMPLES,
        description=("Download an atlas from the data set REPO, check it, and write it to the output."),
    )


def _run(arguments: argparse.Namespace) -> int:
    import dataclasses
    import shutil

    from chanfmt.base.claims import claimed
    from chanfmt.base.errors import UsageError
    from chanfmt.base.files import atomic_file, check_target, output_path
    from chanfmt.format.reader import Atlas
    from chanfmt.hub.atlases import check_valid
    from chanfmt.hub.fetch import fetch
    from chanfmt.hub.locate import SUFFIX
    from chanfmt.hub.names import parse_address

    wanted = parse_address(arguments.repo)
    if arguments.file is not None:
        if wanted.file is not None:
            raise UsageError(f"the file is named twice: {wanted.file} and {arguments.file}", hint="leave out one of them")
        wanted = parse_address(f"{dataclasses.replace(wanted, file=arguments.file)}")
    output = output_path(arguments.output)
    check_target(output, overwrite=arguments.overwrite)
    with claimed(output):
        fetched = fetch(wanted, suffix=SUFFIX)
        check_valid(fetched.path, str(fetched.source))
        with atomic_file(output, overwrite=arguments.overwrite) as temporary:
            shutil.copyfile(fetched.path, temporary)
    say(f"wrote {output}, a copy of {fetched.source}; browse it with: atlas-tui {output}")
    if arguments.json:
        with Atlas.open(output) as atlas:
            framework.print_json(
                {
                    "file": str(output),
                    "source": str(fetched.source),
                    "commit": fetched.source.revision,
                    "content_sha256": atlas.content_sha256,
                }
            )
    return 0
