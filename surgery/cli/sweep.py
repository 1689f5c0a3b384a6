"""`surgery sweep`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import MissingPackageError
from chanfmt.base.narrate import say
from chanfmt.cli.framework import PrintOptions, add_command, parse_options, print_json, print_table
from surgery.cli.options import AtlasOptions, ResultsOptions

if TYPE_CHECKING:
    import argparse

EXAMPLES = (
    "surgery sweep llama.h5 -o sweep",
    "surgery sweep llama.h5 -o sweep --methods scar-prot,wanda --sparsity 0.3,0.5 --protections none --protections supernodes",
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
    from surgery.experiments.sweep_plan import SweepOptions

    return AtlasOptions, SweepOptions, SubjectOptions, ResultsOptions


def _run(arguments: argparse.Namespace) -> None:
    from chanfmt.base.files import output_path
    from chanfmt.hub.locate import open_atlas
    from surgery.experiments.results import check_directory
    from surgery.experiments.subject import SubjectOptions
    from surgery.experiments.sweep import sweep, table
    from surgery.experiments.sweep_plan import SweepOptions
    from surgery.experiments.sweep_plot import write_figure

    options, output = parse_options(arguments, SweepOptions), parse_options(arguments, ResultsOptions)
    subject = parse_options(arguments, SubjectOptions)
    # The atlas may be downloaded below. A fault in the output directory should show before that.
    directory = output_path(output.output)
    check_directory(directory)
    with open_atlas(parse_options(arguments, AtlasOptions).atlas, contained=True) as atlas:
        results = sweep(
            atlas,
            subject.model,
            subject.data,
            **vars(options),
            **subject.running(),
            output=directory,
            overwrite=output.overwrite,
        )
    identity = results.identity
    try:
        title = f"{identity['model']}, {identity['data']}, {identity['tokens']:,} tokens"
        figures = write_figure(results.rows, directory / "sweep", title)
    except MissingPackageError as error:
        figures = ()
        say(f"no figure: {error.message}; {error.hint}")
    say(f"wrote {', '.join(str(path) for path in (*results.files, *figures))}")
    if parse_options(arguments, PrintOptions).json:
        print_json({"identity": identity, "rows": results.rows})
    else:
        print_table(*table(results.rows))
