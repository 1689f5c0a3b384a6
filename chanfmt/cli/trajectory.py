"""`atlas trajectory`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.cli import framework
from chanfmt.cli.options import SeveralAtlasesOptions
from chanfmt.cli.report import ReportOutputOptions, publish

if TYPE_CHECKING:
    import argparse


EXAMPLES = (
    "atlas trajectory step1000.h5 step2000.h5 step4000.h5 -o trajectory",
    "atlas trajectory atlases/checkpoint-100.h5 atlases/checkpoint-200.h5 -o trajectory --json",
)


def add(commands: Any) -> None:
    framework.add_command(
        commands,
        "trajectory",
        "show how importance moves over the checkpoints of a model",
        run=_run,
        options=lambda: (SeveralAtlasesOptions, ReportOutputOptions),
        examples=EXAMPLES,
        description=(
            "Compare atlases of one model's checkpoints, given in order of training, and write a directory as atlas report does: "
            "concentration over training, and when the supernodes settle. The axis shows training steps if all revisions, or all "
            "names of models or files, contain one (step1000, checkpoint-20)."
        ),
    )


def _run(arguments: argparse.Namespace) -> int:
    import contextlib

    from chanfmt.hub.locate import open_atlas
    from chanfmt.reporting.names import short_names
    from chanfmt.reporting.trajectory import make_trajectory

    with contextlib.ExitStack() as stack:

        def make() -> Any:
            atlases = [stack.enter_context(open_atlas(file, contained=True)) for file in arguments.files]
            return make_trajectory(atlases, short_names(atlases))

        return publish(arguments, make)
