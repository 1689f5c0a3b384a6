"""`surgery sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import MissingPackageError
from chanfmt.base.narrate import say, warn
from chanfmt.cli.framework import PrintOptions, add_command, parse_options, print_json, print_table
from surgery.cli.options import AtlasOptions, ResultsOptions

if TYPE_CHECKING:
    import argparse

    from surgery.experiments.subject import Subject

EXAMPLES = (
    "surgery sweep llama.h5 -o sweep",
    "surgery sweep llama.h5 -o sweep --methods scar-prot,wanda --sparsity 0.3,0.5 --protect none --protect supernodes",
    "surgery sweep llama.h5 -o sweep --recover none,lstsq --data pydoc --max-tokens 20000",
)


def add(commands: Any) -> None:
    add_command(
        commands,
        "sweep",
        "measure perplexity of many cuts of a model, as a table and a figure",
        run=_run,
        options=_options,
        examples=EXAMPLES,
        description=(
            "Measure perplexity of many cuts of one loaded model, without writing any of them. The result is a table and a figure. "
            "A second run measures only what is missing."
        ),
    )


def _options() -> tuple[type, ...]:
    from surgery.experiments.subject import SubjectOptions
    from surgery.experiments.sweep import SweepOptions

    return AtlasOptions, SweepOptions, SubjectOptions, ResultsOptions


def _run(arguments: argparse.Namespace) -> None:
    from chanfmt.hub.locate import open_atlas
    from surgery.experiments.results import check_directory
    from surgery.experiments.subject import SubjectOptions, check_atlas, open_subject
    from surgery.experiments.sweep import SweepOptions, plan_runs, sweep, table
    from surgery.experiments.sweep_plot import draw

    options, output = parse_options(arguments, SweepOptions), parse_options(arguments, ResultsOptions)
    talk = parse_options(arguments, PrintOptions)
    directory = Path(output.output)
    # Check the output before a download.
    check_directory(directory)
    with open_atlas(parse_options(arguments, AtlasOptions).atlas, contained=True) as atlas:
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
    """Tell which FFNs of ``subject`` would compute something else in a cut model than they do here, masked."""
    if subject.mixed:
        say(
            f"warning: {len(subject.mixed)} FFNs, {subject.mixed[0]} among them, compute numbers from all their channels "
            "between their projections, including removed channels; a cut model would compute something else there"
        )
