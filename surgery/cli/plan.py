"""`surgery plan`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say, warn
from chanfmt.base.text import printable
from chanfmt.cli.framework import parse_options, print_json, print_table
from surgery.cli.options import AtlasOptions, TalkOptions, add_command
from surgery.planning.options import PlanOptions
from surgery.planning.plan import layer_rows, make_plan

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from chanfmt.format.reader import Atlas
    from surgery.planning.plan import PruningPlan


@dataclass(frozen=True)
class PlanOutputOptions:
    """Where the plan goes."""

    output: str | None = field(
        default=None,
        metadata={
            "help": "write the plan to this file (default: print it only)",
            "short": "-o",
            "metavar": "PLAN",
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the output where it exists"})


def add(commands: Any) -> None:
    add_command(
        commands,
        "plan",
        "decide what a cut would remove, from the atlas alone",
        _run,
        AtlasOptions,
        PlanOptions,
        PlanOutputOptions,
        TalkOptions,
    )


def _run(arguments: argparse.Namespace) -> None:
    import chanfmt
    from chanfmt.base.files import check_target
    from surgery.planning.file import save_plan

    options = parse_options(arguments, PlanOutputOptions)
    talk = parse_options(arguments, TalkOptions)
    if options.output:
        check_target(Path(options.output), overwrite=options.overwrite)
    with chanfmt.open(parse_options(arguments, AtlasOptions).atlas, contained=True) as atlas:
        plan = plan_and_warn(atlas, parse_options(arguments, PlanOptions))
    if options.output:
        save_plan(plan, Path(options.output))
        say(f"wrote {options.output}; apply it with: surgery apply {options.output} --model MODEL -o DIR")
    print_plan(plan, talk)


def plan_and_warn(atlas: Atlas, options: PlanOptions) -> PruningPlan:
    """The plan for ``atlas``. Its warnings are told."""
    plan = make_plan(atlas, options)
    for warning in plan.warnings:
        warn(warning)
    return plan


def print_plan(plan: PruningPlan, talk: TalkOptions) -> None:
    """``plan`` on stdout, layer by layer and in sum."""
    from surgery.result.record import plan_json, summary_rows

    if talk.json:
        print_json(plan_json(plan))
        return
    print_table(*layer_rows(plan))
    print()
    print_pairs(summary_rows(plan))


def print_pairs(rows: Sequence[Sequence[str]]) -> None:
    """Names and values on stdout, a line each."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(printable(f"{name.ljust(width)}  {value}"))
