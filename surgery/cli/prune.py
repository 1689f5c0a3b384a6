"""`surgery prune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.cli.framework import PrintOptions, add_command, parse_options
from surgery.cli.apply import cut
from surgery.cli.options import AtlasOptions, CutOptions
from surgery.cli.plan import print_plan, read_and_plan
from surgery.cli.push import PublishingOptions

if TYPE_CHECKING:
    import argparse

EXAMPLES = (
    "surgery prune llama.h5 --sparsity 0.5 --dry-run",
    "surgery prune llama.h5 --sparsity 0.5 --protect supernodes --recover lstsq -o llama-half",
    "surgery prune small.h5 --model SmolLM2.gguf --sparsity 0.25 -o small-quarter --push",
)


@dataclass(frozen=True)
class DryRunOptions:
    """Whether to stop before the cut."""

    dry_run: bool = field(default=False, metadata={"help": "print the plan and stop"})


def add(commands: Any) -> None:
    add_command(
        commands,
        "prune",
        "cut a model: plan, cut, recover, check, push",
        run=_run,
        options=_options,
        examples=EXAMPLES,
        description=(
            "Cut a model by its importance atlas: plan which channels go, write the smaller model, refit it if asked, and check it."
        ),
    )


def _options() -> tuple[type, ...]:
    from surgery.planning.plan import PlanOptions
    from surgery.recovery.options import RecoveryOptions

    return AtlasOptions, PlanOptions, CutOptions, RecoveryOptions, PublishingOptions, DryRunOptions


def _run(arguments: argparse.Namespace) -> None:
    from chanfmt.hub.locate import open_atlas
    from surgery.planning.plan import PlanOptions
    from surgery.recovery.options import RecoveryOptions, plan_recovery

    options = parse_options(arguments, CutOptions)
    talk = parse_options(arguments, PrintOptions)
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
    # By now an address without a commit may name another file.
    with open_atlas(plan.atlas_source or path) as atlas:
        recovery, atlas_file = plan_recovery(recovery_options, atlas, plan), atlas.path
    cut(plan, options, talk, recovery=recovery, atlas=atlas_file, publishing=publishing)
