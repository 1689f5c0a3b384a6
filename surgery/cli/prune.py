"""`surgery prune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.cli.framework import parse_options
from surgery.cli.apply import as_data, tell
from surgery.cli.options import AtlasOptions, CutOptions, TalkOptions, add_command
from surgery.cli.plan import plan_and_warn, print_plan
from surgery.cli.push import PublishingOptions
from surgery.planning.options import PlanOptions
from surgery.recovery.options import RecoveryOptions

if TYPE_CHECKING:
    import argparse


@dataclass(frozen=True)
class DryRunOptions:
    """Stop early."""

    dry_run: bool = field(default=False, metadata={"help": "print the plan and stop"})


def add(commands: Any) -> None:
    add_command(
        commands,
        "prune",
        "cut a model",
        _run,
        AtlasOptions,
        PlanOptions,
        CutOptions,
        RecoveryOptions,
        PublishingOptions,
        DryRunOptions,
        TalkOptions,
    )


def _run(arguments: argparse.Namespace) -> None:
    import chanfmt

    options = parse_options(arguments, CutOptions)
    talk = parse_options(arguments, TalkOptions)
    dry_run = parse_options(arguments, DryRunOptions).dry_run
    plan_options = parse_options(arguments, PlanOptions)
    recovery_options = parse_options(arguments, RecoveryOptions)
    plan_options.check()
    recovery_options.check()
    publishing = parse_options(arguments, PublishingOptions)
    publishing.check(login=not dry_run)
    with chanfmt.open(parse_options(arguments, AtlasOptions).atlas, contained=True) as atlas:
        if dry_run:
            print_plan(plan_and_warn(atlas, plan_options), talk)
            return
        from surgery.cut.prune import prune

        cut_options = as_data(options)
        result = prune(
            atlas, options.model, options.output, plan_options, cut_options, recovery_options, revision=options.revision
        )
    tell(result, options, talk, publishing)
