"""`atlas merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.cli import framework

if TYPE_CHECKING:
    import argparse


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "merge",
        help="atlases of one model on different text as one",
        description=(
            "Add up atlases of one model that were built on different sequences. Without --model the result has no halo."
        ),
    )
    parser.add_argument("files", metavar="FILE", nargs="+")
    parser.add_argument("-o", dest="output", metavar="FILE", required=True, help="atlas to write")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="the measured model (Hub id, directory or .gguf file), to compute connectivity and the halo",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no narration")
    parser.set_defaults(run=_run)


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

    def tell(text: str) -> None:
        say(text)

    output = Path(arguments.output)
    check_target(output, overwrite=arguments.overwrite)
    with contextlib.ExitStack() as opened:
        atlases = [opened.enter_context(open_atlas(path, contained=True)) for path in arguments.files]
        content = merge(atlases, narrate=lambda text: tell(f"note: {text}"))
    if arguments.model is not None:
        from chanfmt.models.source import own_revision
        from chanfmt.models.stored.weights import StoredWeights

        content = relabelled_with_weights(
            content,
            content.labels,
            StoredWeights.of(locate_model(arguments.model, revision=own_revision(arguments.model, content.model)), content.model),
        )
    if content.dropped:
        advice = "" if arguments.model else "; --model computes connectivity and the halo from the weights"
        tell(f"note: dropped {', '.join(content.dropped)}{advice}")
    write_atlas(content, output)
    tell(
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
