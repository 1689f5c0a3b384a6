"""`atlas build`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt import console

if TYPE_CHECKING:
    import argparse


def add(commands: Any) -> None:
    from chanfmt.produce.options import BuildOptions
    from chanfmt.records import LabelSettings

    parser = commands.add_parser("build", help="measure a model and write its atlas", description=(
        "Measure every FFN channel of MODEL in one pass over calibration text and write the result to FILE."))
    console.add_options(parser, BuildOptions)
    console.add_options(parser, LabelSettings)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from chanfmt.produce.options import BuildOptions
    from chanfmt.records import LabelSettings

    options = console.parse_options(arguments, BuildOptions)
    settings = console.parse_options(arguments, LabelSettings)
    from chanfmt.atlas import Atlas
    from chanfmt.commands.info import info_data, layer_rows, print_layers
    from chanfmt.produce.build import build, plan_build

    if options.dry_run:
        summary = plan_build(options, settings).summary()
        if arguments.json:
            console.print_json(summary)
        else:
            console.print_table(("", ""), [(key, _cell(value)) for key, value in summary.items()])
        return 0
    path = build(options, settings)
    console.say(f"wrote {path}; browse it with: atlas-tui {path}", quiet=options.quiet)
    with Atlas.open(path) as atlas:
        if arguments.json:
            console.print_json(info_data(atlas))
        else:
            print_layers(atlas, layer_rows(atlas))
    return 0


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
