"""`atlas trajectory`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.cli.report import add_output, publish

if TYPE_CHECKING:
    import argparse
    from pathlib import Path


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "trajectory",
        help="how importance moves over checkpoints of one model",
        description=(
            "Compare atlases of one model's checkpoints, given in order of training, and write a directory as atlas report does: "
            "concentration over training, and when the supernodes become what they are. Steps in all revisions, or in all names of "
            "models or files (step1000, checkpoint-20), make the axis."
        ),
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help="two or more atlases")
    add_output(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import contextlib

    from chanfmt.hub.locate import open_atlas
    from chanfmt.reporting.trajectory import make_trajectory

    with contextlib.ExitStack() as stack:

        def make(progress: Any) -> Any:
            atlases = [stack.enter_context(open_atlas(file, contained=True)) for file in arguments.files]
            return make_trajectory(atlases, _names([atlas.path for atlas in atlases]), progress)

        return publish(arguments, make)


def _names(paths: list[Path]) -> list[str]:
    """The files' names, with as many directories before them as tell them apart."""
    parts = [[*path.resolve().parent.parts, path.stem] for path in paths]
    depth = next(
        (
            depth
            for depth in range(1, 1 + max(map(len, parts)))
            if len({tuple(item[-depth:]) for item in parts}) == len({tuple(item) for item in parts})
        ),
        1,
    )
    return ["/".join(item[-depth:]) for item in parts]
