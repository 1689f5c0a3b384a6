"""`atlas merge`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.cli import framework
from chanfmt.cli.options import OutputOptions, SeveralAtlasesOptions

if TYPE_CHECKING:
    import argparse


EXAMPLES = (
    "atlas merge part1.h5 part2.h5 -o all.h5",
    "atlas merge wikitext.h5 code.h5 -o both.h5 --model meta-llama/Llama-3.2-1B",
)


@dataclass(frozen=True)
class WeightsOptions:
    """Which weights are read."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "the measured model (Hub id, directory or .gguf file), to compute connectivity and the halo",
            "metavar": "MODEL",
            "kind": "model",
        },
    )


def add(commands: Any) -> None:
    framework.add_command(
        commands,
        "merge",
        "add up atlases of one model on different text",
        run=_run,
        options=lambda: (SeveralAtlasesOptions, OutputOptions, WeightsOptions),
        examples=EXAMPLES,
        description=(
            "Add up atlases of one model that were built on different sequences. Without --model the result has no halo."
        ),
    )


def _run(arguments: argparse.Namespace) -> int:
    from chanfmt.cli.info import info_data, print_layers
    from chanfmt.format.reader import Atlas
    from chanfmt.hub.rewriting import write_merged

    output = write_merged(arguments.files, arguments.output, model=arguments.model, overwrite=arguments.overwrite)
    with Atlas.open(output) as atlas:
        say(
            f"wrote {output}: {atlas.calibration.sequences:,} sequences of {len(arguments.files)} atlases; "
            f"browse it with: atlas-tui {output}"
        )
        data = info_data(atlas)
        if arguments.json:
            framework.print_json({"inputs": arguments.files, "dropped": list(atlas.dropped), **data})
        else:
            print_layers(atlas, data["layers"])
    return 0
