"""`surgery replaceability`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.cli.framework import PrintOptions, add_command, parse_options, print_json, print_table
from surgery.cli.options import AtlasOptions, StoreOptions

if TYPE_CHECKING:
    import argparse

EXAMPLES = (
    "surgery replaceability llama.h5 --data pydoc --max-tokens 65536",
    "surgery replaceability llama.h5 --layers 3 --select top:lp=100% --peers 64 --store llama-measured.h5",
)


def add(commands: Any) -> None:
    add_command(
        commands,
        "replaceability",
        "measure how well channels are predicted by the other channels of their FFN",
        run=_run,
        options=_options,
        examples=EXAMPLES,
        description=(
            "Predict the value of each selected channel from other channels of its FFN, by ridge regression, and print R^2 on held-out "
            "blocks of a text, next to the R^2 of a null. A channel with an R^2 near 1 says little that its peers do not say."
        ),
    )


def _options() -> tuple[type, ...]:
    from surgery.experiments.replaceability import ReplaceabilityOptions
    from surgery.experiments.subject import SubjectOptions

    return AtlasOptions, ReplaceabilityOptions, SubjectOptions, StoreOptions


def _run(arguments: argparse.Namespace) -> None:
    from chanfmt.hub.locate import open_atlas
    from surgery.experiments.replaceability import ReplaceabilityOptions, replaceability
    from surgery.experiments.subject import SubjectOptions

    store, subject = parse_options(arguments, StoreOptions), parse_options(arguments, SubjectOptions)
    with open_atlas(parse_options(arguments, AtlasOptions).atlas, contained=True) as atlas:
        found = replaceability(
            atlas,
            subject.model,
            subject.data,
            parse_options(arguments, ReplaceabilityOptions),
            **subject.running(),
            store=store.store,
            replace=store.replace,
        )
    if parse_options(arguments, PrintOptions).json:
        print_json({"identity": found.identity, "rows": found.rows})
        return
    print_table(*found.table())
