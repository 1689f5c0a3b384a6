"""`surgery ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say, warn
from chanfmt.cli.framework import parse_options, print_json, print_table
from surgery.cli.options import AtlasOptions, ResultsOptions, TalkOptions, add_command
from surgery.cli.sweep import tell_mixed

if TYPE_CHECKING:
    import argparse


def add(commands: Any) -> None:
    from surgery.experiments.ablation.channels import ChannelOptions
    from surgery.experiments.ablation.dose import DoseOptions
    from surgery.experiments.ablation.halo import HaloOptions
    from surgery.experiments.ablation.removal import RemovalOptions
    from surgery.experiments.subject import SubjectOptions

    summary = "what removing chosen channels of a loaded model costs, with controls"
    parser = commands.add_parser("ablate", help=summary, description=summary[0].upper() + summary[1:] + ".")
    experiments = parser.add_subparsers(metavar="EXPERIMENT", required=True)
    for name, text, kind in (
        ("remove", "remove chosen channels", RemovalOptions),
        ("mean-replace", "put the mean of each chosen channel in its place", RemovalOptions),
        ("halo", "remove the halo with supernodes kept and removed, against channels alike in LP", HaloOptions),
        ("dose", "at one sparsity, remove a growing share of the supernodes in place of other channels", DoseOptions),
        ("channels", "remove single channels across the range of LP, and compare what they cost with it", ChannelOptions),
    ):
        add_command(experiments, name, text, _run, AtlasOptions, kind, SubjectOptions, ResultsOptions, TalkOptions)
        experiments.choices[name].set_defaults(experiment=name, kind=kind)


def _run(arguments: argparse.Namespace) -> None:
    import chanfmt
    from surgery.experiments.ablation.experiments import plan_experiment
    from surgery.experiments.ablation.run import run, summary_table, table
    from surgery.experiments.results import check_directory
    from surgery.experiments.subject import SubjectOptions, check_atlas, open_subject

    output, talk = parse_options(arguments, ResultsOptions), parse_options(arguments, TalkOptions)
    options, directory = parse_options(arguments, arguments.kind), Path(output.output)
    check_directory(directory)
    with chanfmt.open(parse_options(arguments, AtlasOptions).atlas, contained=True) as atlas:
        check_atlas(atlas)
        experiment = plan_experiment(arguments.experiment, atlas, options)
        for warning in experiment.warnings:
            warn(warning)
        subject = open_subject(atlas, parse_options(arguments, SubjectOptions))
        tell_mixed(subject)
        results, rows, summary = run(
            atlas,
            subject,
            experiment,
            directory,
            overwrite=output.overwrite,
        )
    say(f"wrote {', '.join(str(path) for path in results.files)}")
    if talk.json:
        print_json({"identity": results.identity, "summary": summary, "rows": rows})
        return
    print_table(*table(experiment, rows))
    print()
    print_table(*summary_table(summary))
