"""`surgery apply`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base.text import printable
from chanfmt.cli.framework import parse_options, print_json
from surgery.cli.options import CutOptions, TalkOptions, add_command, parse_size
from surgery.cli.plan import print_pairs
from surgery.cut import options as cut
from surgery.result.push import PushOptions

if TYPE_CHECKING:
    import argparse

    from surgery.cli.push import PublishingOptions
    from surgery.result.result import Result


@dataclass(frozen=True)
class PlanFileOptions:
    """A plan that was written earlier."""

    plan: str = field(metadata={"help": "plan written by surgery plan", "positional": "PLAN"})


@dataclass(frozen=True)
class FineTuneOptions:
    """Which weights a plan is for."""

    fine_tune: bool = field(
        default=False,
        metadata={
            "help": "MODEL is a fine-tune of the plan's model: other weights in the same tensors",
        },
    )


def add(commands: Any) -> None:
    add_command(commands, "apply", "cut a model as a plan says", _run, PlanFileOptions, CutOptions, FineTuneOptions, TalkOptions)


def _run(arguments: argparse.Namespace) -> None:
    from surgery.cut.prune import apply
    from surgery.planning.file import load_plan

    plan = load_plan(Path(parse_options(arguments, PlanFileOptions).plan))
    fine_tune = parse_options(arguments, FineTuneOptions).fine_tune
    options = parse_options(arguments, CutOptions)
    result = apply(plan, options.model, options.output, as_data(options, fine_tune=fine_tune), revision=options.revision)
    tell(result, options, parse_options(arguments, TalkOptions))


def as_data(options: CutOptions, *, fine_tune: bool = False) -> cut.CutOptions:
    """``options`` as the library takes them."""
    return cut.CutOptions(options.overwrite, not options.no_verify, fine_tune, parse_size(options.shard_size))


def tell(result: Result, options: CutOptions, talk: TalkOptions, publishing: PublishingOptions | None = None) -> None:
    """Print what was done, and push the result if asked."""
    from surgery.result.push import push
    from surgery.result.record import summary_rows

    report, output = result.report, result.directory
    if not talk.json:
        print_pairs([*summary_rows(report.plan, report), ["output", str(output)]])
    where = {"output": str(output)}
    if publishing and publishing.push is not None:
        push_options = PushOptions(public=publishing.public, create_pr=publishing.create_pr, no_verify=options.no_verify)
        where["url"] = push(output, publishing.push or None, push_options).url
    if talk.json:
        print_json(report.to_json() | where)
    elif "url" in where:
        print(printable(where["url"]))
