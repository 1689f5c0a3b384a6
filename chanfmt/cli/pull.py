"""`atlas pull`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.cli import framework

if TYPE_CHECKING:
    import argparse


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "pull",
        help="get an atlas from the Hugging Face Hub",
        description=("Get an atlas from the data set REPO, check it, and write it to OUT."),
    )
    parser.add_argument("repo", metavar="REPO", help="USER/NAME or USER/NAME@REVISION, or an address hf://...")
    parser.add_argument("file", metavar="FILE", nargs="?", help="file in REPO (default: its only .h5 file)")
    parser.add_argument("-o", dest="output", metavar="OUT", required=True, help="atlas to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no narration")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import dataclasses
    import shutil
    from pathlib import Path

    from chanfmt.base.errors import UsageError
    from chanfmt.base.files import atomic_file, check_target
    from chanfmt.format.reader import Atlas
    from chanfmt.hub.atlases import check_valid
    from chanfmt.hub.fetch import fetch
    from chanfmt.hub.locate import SUFFIX
    from chanfmt.hub.names import parse_address

    def tell(text: str) -> None:
        say(text)

    wanted = parse_address(arguments.repo)
    if arguments.file is not None:
        if wanted.file is not None:
            raise UsageError(f"the file is named twice: {wanted.file} and {arguments.file}")
        wanted = parse_address(f"{dataclasses.replace(wanted, file=arguments.file)}")
    output = Path(arguments.output)
    check_target(output, overwrite=arguments.overwrite)
    fetched = fetch(wanted, suffix=SUFFIX)
    check_valid(fetched.path, str(fetched.source))
    with atomic_file(output) as temporary:
        shutil.copyfile(fetched.path, temporary)
    tell(f"wrote {output}, a copy of {fetched.source}; browse it with: atlas-tui {output}")
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
