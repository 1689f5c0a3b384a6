"""`surgery prune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.cli.framework import PrintOptions, add_command, parse_options
from surgery.cli.apply import as_data, tell
from surgery.cli.options import AtlasOptions, CutOptions
from surgery.cli.plan import expect_and_warn, plan_and_warn, print_plan
from surgery.cli.push import PublishingOptions

if TYPE_CHECKING:
    import argparse

EXAMPLES = (
    "surgery prune llama.h5 --to 75% --dry-run",
    "surgery prune llama.h5 --sparsity 0.5 --recover lstsq -o llama-half",
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
    from surgery.planning.options import PlanOptions
    from surgery.recovery.options import RecoveryOptions

    return AtlasOptions, PlanOptions, CutOptions, RecoveryOptions, PublishingOptions, DryRunOptions


def _run(arguments: argparse.Namespace) -> int:
    from surgery.recovery.processes import run_command

    return run_command(partial(_cut, arguments))


def _cut(arguments: argparse.Namespace) -> None:
    from chanfmt.hub.locate import check_model, open_atlas
    from surgery.planning.options import PlanOptions
    from surgery.planning.shrink import check_plan
    from surgery.recovery.options import RecoveryOptions

    options = parse_options(arguments, CutOptions)
    talk = parse_options(arguments, PrintOptions)
    dry_run = parse_options(arguments, DryRunOptions).dry_run
    plan_options = parse_options(arguments, PlanOptions)
    recovery_options = parse_options(arguments, RecoveryOptions)
    plan_options.check()
    recovery_options.check()
    cut_options = as_data(options)
    if options.model is not None:
        check_model(options.model, revision=options.revision)
    if cut_options.imatrix is not None:
        from chanfmt.models.imatrix_file import read_imatrix

        # A dry run, too, says that a file is not a matrix.
        read_imatrix(cut_options.imatrix)
    if options.output is not None and not dry_run:
        from surgery.cut.apply import check_output

        check_output(Path(options.output), overwrite=options.overwrite)
    publishing = parse_options(arguments, PublishingOptions)
    publishing.check(login=not dry_run)
    with open_atlas(parse_options(arguments, AtlasOptions).atlas, contained=True) as atlas:
        if dry_run:
            from surgery.cut.gguf.size import in_format

            plan = plan_and_warn(
                atlas, in_format(plan_options, cut_options, atlas.blocks, options.model, recovery_options.recover)
            )
            print_plan(plan, talk, expect_and_warn(plan, recovery_options.recover))
            if not options.allow_padding:
                check_plan(plan)
            return
        from surgery.cut.prune import prune

        result = prune(
            atlas, options.model, options.output, plan_options, cut_options, recovery_options, revision=options.revision
        )
    tell(result, options, talk, publishing)
