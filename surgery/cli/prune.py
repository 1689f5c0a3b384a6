"""`surgery prune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.cli.framework import parse_options
from surgery.cli.apply import cut
from surgery.cli.options import AtlasOptions, CutOptions, TalkOptions, add_command
from surgery.cli.plan import print_plan, read_and_plan
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
    from surgery.recovery.options import plan_recovery

    options = parse_options(arguments, CutOptions)
    talk = parse_options(arguments, TalkOptions)
    dry_run = parse_options(arguments, DryRunOptions).dry_run
    plan_options = parse_options(arguments, PlanOptions)
    recovery_options = parse_options(arguments, RecoveryOptions)
    plan_options.check()
    recovery_options.check()
    publishing = parse_options(arguments, PublishingOptions)
    publishing.check(login=not dry_run)
    path = parse_options(arguments, AtlasOptions).atlas
    plan = read_and_plan(path, plan_options)
    if dry_run:
        print_plan(plan, talk)
        return
    # An address without a commit may name another file by now.
    with chanfmt.open(plan.atlas_source or path) as atlas:
        recovery, atlas_file = plan_recovery(recovery_options, atlas, plan), atlas.path
    cut(plan, options, talk, recovery=recovery, atlas=atlas_file, publishing=publishing)
