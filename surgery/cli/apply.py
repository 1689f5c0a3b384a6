"""`surgery apply`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.base.text import printable
from chanfmt.cli.framework import PrintOptions, add_command, parse_options, print_json, print_pairs
from surgery.cli.options import CutOptions, parse_size

if TYPE_CHECKING:
    import argparse

    from surgery.cli.push import PublishingOptions
    from surgery.planning.plan import PruningPlan
    from surgery.recovery.options import BiasRecovery, Refit

EXAMPLES = (
    "surgery apply half.safetensors --model meta-llama/Llama-3.2-1B -o llama-half",
    "surgery apply half.safetensors --model ./tuned --fine-tune -o tuned-half",
)


@dataclass(frozen=True)
class PlanFileOptions:
    """Which plan."""

    plan: str = field(metadata={"help": "plan written by surgery plan", "positional": "PLAN"})


@dataclass(frozen=True)
class FineTuneOptions:
    """Which weights the plan accepts."""

    fine_tune: bool = field(
        default=False,
        metadata={
            "help": "accept other weights than the plan's: MODEL is a fine-tune of the plan's model, with the same tensors",
        },
    )


def add(commands: Any) -> None:
    add_command(
        commands,
        "apply",
        "cut a model as a plan says",
        run=_run,
        options=lambda: (PlanFileOptions, CutOptions, FineTuneOptions),
        examples=EXAMPLES,
        description=(
            "Cut a model as a plan says. The plan is a file from surgery plan, or the kept_channels.safetensors of an earlier result."
        ),
    )


def _run(arguments: argparse.Namespace) -> None:
    from surgery.planning.plan import load_plan

    plan = load_plan(Path(parse_options(arguments, PlanFileOptions).plan))
    fine_tune = parse_options(arguments, FineTuneOptions).fine_tune
    cut(plan, parse_options(arguments, CutOptions), parse_options(arguments, PrintOptions), fine_tune=fine_tune)


def cut(
    plan: PruningPlan,
    options: CutOptions,
    talk: PrintOptions,
    *,
    fine_tune: bool = False,
    recovery: Refit | BiasRecovery | None = None,
    atlas: Path | None = None,
    publishing: PublishingOptions | None = None,
) -> None:
    """Cut a model as ``plan`` says, print what was done, and push the result if ``publishing`` asks for it."""
    from chanfmt.base.command_line import recorded_command
    from surgery.cut.apply import apply_plan, check_output
    from surgery.cut.source import find_model
    from surgery.result.names import default_name
    from surgery.result.push import PushOptions, push
    from surgery.result.record import summary_rows

    output = Path(options.output or default_name(plan))
    shard_bytes = parse_size(options.shard_size)
    # Check the output before a download.
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
        command=recorded_command(),
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
