"""`atlas push`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.cli import framework

if TYPE_CHECKING:
    import argparse


def add(commands: Any) -> None:
    from chanfmt.hub.publish import PublishOptions

    parser = commands.add_parser(
        "push",
        help="publish an atlas on the Hugging Face Hub",
        description=(
            "Publish FILE with a card as the data set REPO, private unless --public, and read it back. After a break, the same "
            "command uploads what is missing."
        ),
    )
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("repo", metavar="REPO", help="USER/NAME, or NAME for one of yours")
    framework.add_options(parser, PublishOptions)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no narration")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from chanfmt.cli.info import layer_rows, layer_table
    from chanfmt.hub.atlases import check_valid, publish_atlas
    from chanfmt.hub.locate import locate_atlas, open_atlas
    from chanfmt.hub.names import check_repo
    from chanfmt.hub.publish import PublishOptions

    def tell(text: str) -> None:
        say(text)

    check_repo(arguments.repo)
    path = locate_atlas(arguments.file).path
    check_valid(path, arguments.file)
    with open_atlas(path, contained=True) as atlas:
        options = framework.parse_options(arguments, PublishOptions)
        if options.public and atlas.calibration.token_ids is not None:
            tell("note: the file holds the token ids of its calibration text; atlas strip leaves them out")
        done, place = publish_atlas(atlas, arguments.repo, layer_table(atlas, layer_rows(atlas)), options)
    tell(f"published and read back; use it as: {place}")
    if arguments.json:
        framework.print_json({"repo": done.repo, "url": done.url, "commit": done.commit, "address": str(place)})
    else:
        print(done.url)
    return 0
