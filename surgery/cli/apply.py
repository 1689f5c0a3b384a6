"""`surgery apply`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.base.text import printable
from chanfmt.cli.framework import parse_options, print_json
from surgery.cli.options import CutOptions, TalkOptions, add_command, parse_size
from surgery.cli.plan import print_pairs
from surgery.result.push import PushOptions

if TYPE_CHECKING:
    import argparse

    from surgery.cli.push import PublishingOptions
    from surgery.planning.plan import PruningPlan
    from surgery.recovery.options import BiasRecovery, Refit


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
    from surgery.planning.file import load_plan

    plan = load_plan(Path(parse_options(arguments, PlanFileOptions).plan))
    fine_tune = parse_options(arguments, FineTuneOptions).fine_tune
    cut(plan, parse_options(arguments, CutOptions), parse_options(arguments, TalkOptions), fine_tune=fine_tune)


def cut(
    plan: PruningPlan,
    options: CutOptions,
    talk: TalkOptions,
    *,
    fine_tune: bool = False,
    recovery: Refit | BiasRecovery | None = None,
    atlas: Path | None = None,
    publishing: PublishingOptions | None = None,
) -> None:
    """Cut the model that ``options`` names as ``plan`` says, print what was done, and push it if asked."""
    from chanfmt.base.command_line import recorded_command
    from surgery.cut.apply import apply_plan, check_output
    from surgery.cut.source import find_model
    from surgery.result.names import default_name
    from surgery.result.push import push
    from surgery.result.record import summary_rows

    output = Path(options.output or default_name(plan))
    shard_bytes = parse_size(options.shard_size)
    # A download may follow: complain about the output before it.
    check_output(output, overwrite=options.overwrite)
    model = find_model(plan.model, options.model, options.revision)
    say(f"cutting {model.id}")
    if model.revision and (model.source, model.id) == (plan.model.source, plan.model.id):
        plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, revision=model.revision))
    report = apply_plan(
        plan,
        model.directory,
        output,
        overwrite=options.overwrite,
        verify=not options.no_verify,
        fine_tune=model if fine_tune else None,
        shard_bytes=shard_bytes,
        recovery=recovery,
        atlas=atlas,
        command=recorded_command("surgery"),
    )
    say(f"wrote {output}")
    if not talk.json:
        print_pairs([*summary_rows(plan, report), ["output", str(output)]])
    where = {"output": str(output)}
    if publishing and publishing.push is not None:
        push_options = PushOptions(public=publishing.public, create_pr=publishing.create_pr, no_verify=options.no_verify)
        where["url"] = push(output, publishing.push or None, push_options).url
    if talk.json:
        print_json(report.to_json() | where)
    elif "url" in where:
        print(printable(where["url"]))
