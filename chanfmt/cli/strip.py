"""`atlas strip`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say

if TYPE_CHECKING:
    import argparse


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "strip",
        help="an atlas for sharing, without its sums and its text",
        description=(
            "Write FILE again with its metrics and labels, without the sums behind them and without the token ids of the "
            "calibration text. The result cannot be merged."
        ),
    )
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("-o", dest="output", metavar="FILE", required=True, help="atlas to write")
    parser.add_argument("--keep-tokens", action="store_true", help="keep the token ids of the calibration text")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from chanfmt.algebra.rewrite import noted
    from chanfmt.algebra.strip import stripped
    from chanfmt.base.files import check_target
    from chanfmt.format.writer import write_atlas
    from chanfmt.hub.locate import open_atlas

    output = Path(arguments.output)
    check_target(output, overwrite=arguments.overwrite)
    # A damaged file must not come out with a fresh digest.
    with open_atlas(arguments.file, verify=True, contained=True) as atlas:
        size = atlas.path.stat().st_size
        content = noted(
            stripped(atlas.content(), keep_tokens=arguments.keep_tokens), "strip", [atlas.content_sha256], [atlas.hub_source]
        )
    write_atlas(content, output)
    without = [*content.dropped, *(["the token ids"] if content.calibration.token_ids is None else [])]
    say(f"wrote {output}: {output.stat().st_size / 1e6:,.1f} of {size / 1e6:,.1f} MB; without {', '.join(without)}")
    return 0
