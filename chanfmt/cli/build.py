"""`atlas build`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import ChanfmtError
from chanfmt.base.narrate import say
from chanfmt.base.text import number
from chanfmt.cli import framework

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from chanfmt.building.options import BuildOptions
    from chanfmt.format.records import LabelSettings


EXAMPLES = (
    "atlas build meta-llama/Llama-3.2-1B -o llama.h5",
    "atlas build SmolLM2.gguf -o small.h5 --calib pydoc --sequences 16 --seq-len 256",
    "atlas build ./checkpoint -o mixed.h5 --calib wikitext2=3 --calib notes.txt=1 --resume",
)


def add(commands: Any) -> None:
    framework.add_command(
        commands,
        "build",
        "measure a model and write its atlas",
        run=_run,
        options=_options,
        examples=EXAMPLES,
        description=(
            "Measure every FFN channel of MODEL in one pass over calibration text, or over given inputs, and write the result to FILE."
        ),
    )


def _options() -> tuple[type, ...]:
    from chanfmt.building.options import BuildOptions
    from chanfmt.format.records import LabelSettings

    return BuildOptions, LabelSettings


def _run(arguments: argparse.Namespace) -> int:
    from chanfmt.building.options import BuildOptions
    from chanfmt.format.records import LabelSettings

    options = framework.parse_options(arguments, BuildOptions)
    settings = framework.parse_options(arguments, LabelSettings)
    from chanfmt.base.processes import outlive_others, rank
    from chanfmt.cli.info import info_data, layer_rows, print_layers
    from chanfmt.format.reader import Atlas
    from chanfmt.hub.locate import locate_model

    if rank():
        return _follow(options, settings)
    from chanfmt.building.build import build
    from chanfmt.building.plan import plan_build

    if options.dry_run:
        summary = plan_build(options, settings, locate_model).summary()
        if arguments.json:
            framework.print_json(summary)
        else:
            framework.print_pairs([(key, _cell(value)) for key, value in summary.items()])
        return 0
    paths: list[Path] = []
    try:
        if options.revisions is None:
            path = build(options, settings, locate_model)
        else:
            from chanfmt.building.series import build_series

            paths = build_series(options, settings, locate_model)
    except ChanfmtError:
        outlive_others()
        raise
    if options.revisions is not None:
        if arguments.json:
            framework.print_json([str(path) for path in paths])
        else:
            names = " ".join(map(str, paths))
            say(f"draw them with: atlas trajectory {names} -o {options.path}-trajectory")
        return 0
    say(f"wrote {path}; browse it with: atlas-tui {path}")
    with Atlas.open(path) as atlas:
        if arguments.json:
            framework.print_json(info_data(atlas))
        else:
            print_layers(atlas, layer_rows(atlas))
    return 0


def _follow(options: BuildOptions, settings: LabelSettings) -> int:
    """Build as one of torchrun's processes that leave all messages to the first process."""
    if options.dry_run:
        return 0
    from chanfmt.base.processes import followed
    from chanfmt.building.build import build
    from chanfmt.building.series import build_series
    from chanfmt.hub.locate import locate_model

    return followed(lambda: (build if options.revisions is None else build_series)(options, settings, locate_model))


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return number(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)
