"""`surgery sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import MissingPackageError
from chanfmt.base.narrate import say, warn
from chanfmt.cli.framework import parse_options, print_json, print_table
from surgery.cli.options import AtlasOptions, ResultsOptions, TalkOptions, add_command

if TYPE_CHECKING:
    import argparse

    from surgery.experiments.subject import Subject


def add(commands: Any) -> None:
    from surgery.experiments.subject import SubjectOptions
    from surgery.experiments.sweep import SweepOptions

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
    import chanfmt
    from surgery.experiments.results import check_directory
    from surgery.experiments.subject import SubjectOptions, check_atlas, open_subject
    from surgery.experiments.sweep import SweepOptions, plan_runs, sweep, table
    from surgery.experiments.sweep_plot import draw

    options, output = parse_options(arguments, SweepOptions), parse_options(arguments, ResultsOptions)
    talk = parse_options(arguments, TalkOptions)
    directory = Path(output.output)
    # A download may follow: complain about the output before it.
    check_directory(directory)
    with chanfmt.open(parse_options(arguments, AtlasOptions).atlas, contained=True) as atlas:
        check_atlas(atlas)
        runs, warnings = plan_runs(atlas, options)
        for warning in warnings:
            warn(warning)
        subject = open_subject(atlas, parse_options(arguments, SubjectOptions))
        tell_mixed(subject)
        results = sweep(
            atlas,
            subject,
            runs,
            options.shared(),
            directory,
            overwrite=output.overwrite,
        )
        title = f"{atlas.model.id}, {subject.identity['data']}, {subject.identity['tokens']:,} tokens"
    try:
        files = draw(results.rows, directory / "sweep", title)
    except MissingPackageError as error:
        files = ()
        say(f"no figure: {error.message}; {error.hint}")
    say(f"wrote {', '.join(str(path) for path in (*results.files, *files))}")
    if talk.json:
        print_json({"identity": results.identity, "rows": results.rows})
    else:
        print_table(*table(results.rows))


def tell_mixed(subject: Subject) -> None:
    """Tell which FFNs of ``subject`` a cut would make compute something else than masking does."""
    if subject.mixed:
        say(
            f"warning: {len(subject.mixed)} FFNs, {subject.mixed[0]} among them, compute numbers from all their channels "
            "between their projections, removed ones too; a model that is cut there would compute something else"
        )
