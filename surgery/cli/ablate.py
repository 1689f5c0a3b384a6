"""`surgery ablate`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.cli.framework import PrintOptions, add_command, add_group, parse_options, print_json, print_line, print_table
from surgery.cli.options import AtlasOptions, ResultsOptions, StoreOptions

if TYPE_CHECKING:
    import argparse

EXPERIMENTS = {
    "remove": (
        "remove chosen channels",
        (
            "surgery ablate remove llama.h5 -o removed --select supernodes --data pydoc",
            "surgery ablate remove llama.h5 -o removed --select top:taylor=2% --control random,lp-matched --layers 0-3",
        ),
    ),
    "mean-replace": (
        "replace each chosen channel by its mean activation",
        (
            "surgery ablate mean-replace llama.h5 -o means --select supernodes",
            "surgery ablate mean-replace llama.h5 -o means --one-layer-at-a-time --max-tokens 20000",
        ),
    ),
    "halo": (
        "remove the halo, with supernodes kept and with supernodes removed, and compare with channels of similar LP",
        (
            "surgery ablate halo llama.h5 -o halo",
            "surgery ablate halo llama.h5 -o halo --seeds 0-4 --layers 0-7",
        ),
    ),
    "dose": (
        "at one sparsity, remove a growing share of the supernodes in place of other channels",
        (
            "surgery ablate dose llama.h5 -o dose --sparsity 0.5",
            "surgery ablate dose llama.h5 -o dose --doses 0:1:0.25 --method wanda",
        ),
    ),
    "channels": (
        "remove single channels across the range of LP, and compare their cost with their LP",
        (
            "surgery ablate channels llama.h5 -o channels",
            "surgery ablate channels llama.h5 -o channels --channels 16 --layers 0,15",
            "surgery ablate channels llama.h5 -o super --select supernodes@0-3 --store llama-measured.h5",
        ),
    ),
    "weights": (
        "set single weights of write matrices to 0, beside other weights of the same channel and the whole channel",
        (
            "surgery ablate weights llama.h5 -o weights --weight 2:3968:7003",
            "surgery ablate weights llama.h5 -o weights --weight 2:3968:7003 --weight 1:788:2427 --controls 10",
        ),
    ),
}
"""Name of each experiment to what it does and examples of it."""


STORING = "channels"
"""The experiment whose losses can be stored in an atlas."""


def add(commands: Any) -> None:
    summary = "measure what removing chosen channels costs, with controls"
    parser = commands.add_parser(
        "ablate", help=summary, description="Measure what removing chosen channels of a loaded model costs.", printing=False
    )
    experiments = add_group(parser, "EXPERIMENT")
    for name, (text, examples) in EXPERIMENTS.items():
        add_command(experiments, name, text, run=_run, options=partial(_options, name), examples=examples, experiment=name)


def _options(name: str) -> tuple[type, ...]:
    from surgery.experiments.subject import SubjectOptions

    return (AtlasOptions, _kind(name), SubjectOptions, ResultsOptions, *((StoreOptions,) if name == STORING else ()))


def _kind(name: str) -> type[Any]:
    """The options of the experiment ``name``."""
    from surgery.experiments.ablation.experiments import kind_of

    return kind_of(name).options


def _run(arguments: argparse.Namespace) -> None:
    from chanfmt.base.files import output_path
    from chanfmt.hub.locate import open_atlas
    from surgery.experiments.ablation.run import ablate
    from surgery.experiments.ablation.tables import summary_table
    from surgery.experiments.results import check_directory
    from surgery.experiments.subject import SubjectOptions

    options, output = parse_options(arguments, _kind(arguments.experiment)), parse_options(arguments, ResultsOptions)
    store = parse_options(arguments, StoreOptions) if arguments.experiment == STORING else StoreOptions()
    subject = parse_options(arguments, SubjectOptions)
    # The atlas may be downloaded below. A fault in the output directory should show before that.
    directory = output_path(output.output)
    check_directory(directory)
    with open_atlas(parse_options(arguments, AtlasOptions).atlas, contained=True) as atlas:
        ablation = ablate(
            atlas,
            arguments.experiment,
            subject.model,
            subject.data,
            **vars(options),
            **subject.running(),
            output=directory,
            overwrite=output.overwrite,
            store=store.store,
            replace=store.replace,
        )
    results = ablation.results
    say(f"wrote {', '.join(str(path) for path in results.files)}")
    if parse_options(arguments, PrintOptions).json:
        print_json({"identity": results.identity, "summary": ablation.summary, "rows": ablation.rows})
        return
    print_table(*ablation.table())
    print_line()
    print_table(*summary_table(ablation.summary))
