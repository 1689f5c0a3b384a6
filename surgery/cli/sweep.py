"""`surgery sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import MissingPackageError
from chanfmt.base.narrate import say
from chanfmt.cli.framework import parse_options, print_json, print_table
from surgery.cli.options import AtlasOptions, ResultsOptions, TalkOptions, add_command

if TYPE_CHECKING:
    import argparse


def add(commands: Any) -> None:
    from surgery.experiments.subject import SubjectOptions
    from surgery.experiments.sweep_plan import SweepOptions

    add_command(
        commands,
        "sweep",
        "perplexity of many cuts of one loaded model, as a table and a figure",
        _run,
        AtlasOptions,
        SweepOptions,
        SubjectOptions,
        ResultsOptions,
        TalkOptions,
    )


def _run(arguments: argparse.Namespace) -> None:
    from chanfmt.hub.locate import open_atlas
    from surgery.experiments.results import check_directory
    from surgery.experiments.subject import SubjectOptions
    from surgery.experiments.sweep import sweep, table
    from surgery.experiments.sweep_plan import SweepOptions
    from surgery.experiments.sweep_plot import write_figure

    options, output = parse_options(arguments, SweepOptions), parse_options(arguments, ResultsOptions)
    subject = parse_options(arguments, SubjectOptions)
    # The atlas may be downloaded below. A fault in the output directory should show before that.
    check_directory(Path(output.output))
    with open_atlas(parse_options(arguments, AtlasOptions).atlas, contained=True) as atlas:
        results = sweep(
            atlas,
            subject.model,
            subject.data,
            **vars(options),
            **subject.running(),
            output=output.output,
            overwrite=output.overwrite,
        )
    identity = results.identity
    try:
        title = f"{identity['model']}, {identity['data']}, {identity['tokens']:,} tokens"
        figures = write_figure(results.rows, Path(output.output) / "sweep", title)
    except MissingPackageError as error:
        figures = ()
        say(f"no figure: {error.message}; {error.hint}")
    say(f"wrote {', '.join(str(path) for path in (*results.files, *figures))}")
    if parse_options(arguments, TalkOptions).json:
        print_json({"identity": identity, "rows": results.rows})
    else:
        print_table(*table(results.rows))
