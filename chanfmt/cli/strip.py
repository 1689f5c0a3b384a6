"""`atlas strip`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.cli import framework
from chanfmt.cli.options import AtlasOptions, OutputOptions

if TYPE_CHECKING:
    import argparse


EXAMPLES = (
    "atlas strip llama.h5 -o shared.h5",
    "atlas strip llama.h5 -o shared.h5 --keep-tokens",
)


@dataclass(frozen=True)
class StripOptions:
    """What is kept."""

    keep_tokens: bool = field(default=False, metadata={"help": "keep the token ids of the calibration text"})


def add(commands: Any) -> None:
    framework.add_command(
        commands,
        "strip",
        "write an atlas for sharing, without its sums and its text",
        run=_run,
        options=lambda: (AtlasOptions, OutputOptions, StripOptions),
        examples=EXAMPLES,
        description=(
            "Write FILE again with its metrics and labels, without the sums behind them and without the token ids of the "
            "calibration text. The result cannot be merged."
        ),
    )


def _run(arguments: argparse.Namespace) -> int:
    from chanfmt.algebra.rewrite import noted
    from chanfmt.algebra.strip import stripped
    from chanfmt.base.claims import claimed
    from chanfmt.base.files import check_target, output_path
    from chanfmt.format.writer import write_atlas
    from chanfmt.hub.locate import open_atlas

    output = output_path(arguments.output)
    check_target(output, overwrite=arguments.overwrite)
    # Verify first: a damaged file must not get a new, valid digest.
    with claimed(output), open_atlas(arguments.file, verify=True, contained=True) as atlas:
        size = atlas.path.stat().st_size
        content = noted(
            stripped(atlas.content(), keep_tokens=arguments.keep_tokens), "strip", [atlas.content_sha256], [atlas.hub_source]
        )
        digest = write_atlas(content, output, overwrite=arguments.overwrite)
    without = [*content.dropped, *(["the token ids"] if content.calibration.token_ids is None else [])]
    say(f"wrote {output}: {output.stat().st_size / 1e6:,.1f} of {size / 1e6:,.1f} MB; without {', '.join(without)}")
    if arguments.json:
        framework.print_json(
            {"file": str(output), "content_sha256": digest, "bytes": output.stat().st_size, "dropped": list(content.dropped)}
        )
    return 0
