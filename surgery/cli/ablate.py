"""`surgery ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.cli.framework import parse_options, print_json, print_table
from surgery.cli.options import AtlasOptions, ResultsOptions, TalkOptions, add_command

if TYPE_CHECKING:
    import argparse


def add(commands: Any) -> None:
    from surgery.experiments.ablation.experiments import EXPERIMENTS
    from surgery.experiments.subject import SubjectOptions

    summary = "what removing chosen channels of a loaded model costs, with controls"
    parser = commands.add_parser("ablate", help=summary, description=summary[0].upper() + summary[1:] + ".")
    experiments = parser.add_subparsers(metavar="EXPERIMENT", required=True)
    for name, kind in EXPERIMENTS.items():
        add_command(
            experiments, name, kind.summary, _run, AtlasOptions, kind.options, SubjectOptions, ResultsOptions, TalkOptions
        )
        experiments.choices[name].set_defaults(experiment=name, kind=kind.options)


def _run(arguments: argparse.Namespace) -> None:
    from chanfmt.hub.locate import open_atlas
    from surgery.experiments.ablation.run import ablate
    from surgery.experiments.ablation.tables import summary_table
    from surgery.experiments.results import check_directory
    from surgery.experiments.subject import SubjectOptions

    options, output = parse_options(arguments, arguments.kind), parse_options(arguments, ResultsOptions)
    subject = parse_options(arguments, SubjectOptions)
    # The atlas may be downloaded below. A fault in the output directory should show before that.
    check_directory(Path(output.output))
    with open_atlas(parse_options(arguments, AtlasOptions).atlas, contained=True) as atlas:
        ablation = ablate(
            atlas,
            arguments.experiment,
            subject.model,
            subject.data,
            **vars(options),
            **subject.running(),
            output=output.output,
            overwrite=output.overwrite,
        )
    results = ablation.results
    say(f"wrote {', '.join(str(path) for path in results.files)}")
    if parse_options(arguments, TalkOptions).json:
        print_json({"identity": results.identity, "summary": ablation.summary, "rows": ablation.rows})
        return
    print_table(*ablation.table())
    print()
    print_table(*summary_table(ablation.summary))
