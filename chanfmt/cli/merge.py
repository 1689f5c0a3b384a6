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
    import contextlib
    from pathlib import Path

    from chanfmt.algebra.merge import merge
    from chanfmt.algebra.relabel import relabelled_with_weights
    from chanfmt.base.files import check_target
    from chanfmt.cli.info import info_data, print_layers
    from chanfmt.format.reader import Atlas
    from chanfmt.format.writer import write_atlas
    from chanfmt.hub.locate import locate_model, open_atlas

    output = Path(arguments.output)
    check_target(output, overwrite=arguments.overwrite)
    with contextlib.ExitStack() as opened:
        atlases = [opened.enter_context(open_atlas(path, contained=True)) for path in arguments.files]
        content = merge(atlases, narrate=lambda text: say(f"note: {text}"))
    if arguments.model is not None:
        from chanfmt.models.source import own_revision
        from chanfmt.models.stored.weights import StoredWeights

        content = relabelled_with_weights(
            content,
            content.labels,
            StoredWeights.of(locate_model(arguments.model, revision=own_revision(arguments.model, content.model)), content.model),
        )
    if content.dropped:
        advice = "" if arguments.model else "; add --model to compute connectivity and the halo from the weights"
        say(f"note: dropped {', '.join(content.dropped)}{advice}")
    write_atlas(content, output)
    say(
        f"wrote {output}: {content.calibration.sequences:,} sequences of {len(arguments.files)} atlases; "
        f"browse it with: atlas-tui {output}"
    )
    with Atlas.open(output) as atlas:
        data = info_data(atlas)
        if arguments.json:
            framework.print_json({"inputs": arguments.files, "dropped": list(atlas.dropped), **data})
        else:
            print_layers(atlas, data["layers"])
    return 0
