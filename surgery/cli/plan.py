"""`surgery plan`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import UsageError
from chanfmt.base.narrate import say, warn
from chanfmt.cli.framework import PrintOptions, add_command, parse_options, print_json, print_line, print_pairs, print_table
from surgery.cli.options import AtlasOptions
from surgery.planning.formats import GGUF, SAFETENSORS

if TYPE_CHECKING:
    import argparse

    from chanfmt.format.reader import Atlas
    from surgery.planning.expect import Expectation
    from surgery.planning.options import PlanOptions
    from surgery.planning.plan import PruningPlan

EXAMPLES = (
    "surgery plan llama.h5 --to 75%",
    "surgery plan llama.h5 --sparsity 0.5 --protect decoder/3:7,12 -o half.safetensors",
    "surgery plan llama.h5 --sparsity 0.3 --method wanda --allocation global --json",
)


@dataclass(frozen=True)
class ResultFormatOptions:
    """What the result's weights will be."""

    dtype: str | None = field(
        default=None,
        metadata={"help": "dtype of the result, for a --to in bytes: float32, bfloat16, float16 (default: the model's)"},
    )
    format: str = field(
        default=SAFETENSORS,
        metadata={"help": "format of the result, as for surgery prune: safetensors, or gguf", "metavar": "FORMAT"},
    )
    quant: str | None = field(
        default=None,
        metadata={"help": "type of all matrices of a GGUF result, as for surgery prune", "metavar": "TYPE"},
    )
    cut_quant: str | None = field(
        default=None,
        metadata={"help": "type of the matrices that the cut quantises again, as for surgery prune", "metavar": "TYPE"},
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "the .gguf file that was measured: with --format gguf, sizes in bytes are those of its cut",
            "metavar": "FILE",
            "kind": "model",
        },
    )


@dataclass(frozen=True)
class PlanOutputOptions:
    """Where the plan goes."""

    output: str | None = field(
        default=None,
        metadata={
            "help": "write the plan to this file too",
            "flag": "--output",
            "short": "-o",
            "metavar": "PLAN",
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the output if it exists"})


def add(commands: Any) -> None:
    add_command(
        commands,
        "plan",
        "decide what a cut would remove, from the atlas alone",
        run=_run,
        options=_options,
        examples=EXAMPLES,
        description=(
            "Decide from the atlas alone what a cut would remove. Print the plan, and write it to a file for surgery apply."
        ),
    )


def _options() -> tuple[type, ...]:
    from surgery.planning.options import PlanOptions

    return AtlasOptions, PlanOptions, ResultFormatOptions, PlanOutputOptions


def _run(arguments: argparse.Namespace) -> None:
    from chanfmt.base.files import check_target, output_path
    from chanfmt.hub.locate import open_atlas
    from surgery.planning.file import save_plan
    from surgery.planning.options import PlanOptions
    from surgery.planning.shrink import check_plan

    options = parse_options(arguments, PlanOutputOptions)
    talk = parse_options(arguments, PrintOptions)
    plan_options = parse_options(arguments, PlanOptions)
    plan_options.check()
    wanted = parse_options(arguments, ResultFormatOptions)
    path = output_path(options.output) if options.output else None
    if path is not None:
        check_target(path, overwrite=options.overwrite)
    with open_atlas(parse_options(arguments, AtlasOptions).atlas, contained=True) as atlas:
        plan = plan_and_warn(atlas, _in_format(atlas, plan_options, wanted))
    if path is not None:
        save_plan(plan, path, overwrite=options.overwrite)
        say(f"wrote {path}; apply it with: surgery apply {path} --model MODEL -o DIR")
    print_plan(plan, talk, expect_and_warn(plan))
    try:
        check_plan(plan)
    except UsageError as error:
        warn(f"surgery prune would refuse this plan: {error.message}; {error.hint}")


def _in_format(atlas: Atlas, plan_options: PlanOptions, wanted: ResultFormatOptions) -> PlanOptions:
    """``plan_options`` with the format that is ``wanted``. Raises `UsageError` if an option has no effect."""
    from surgery.cut.options import CutOptions

    # A dtype counts bytes here, and it may be one that no result can have.
    dtype = wanted.dtype if wanted.format == GGUF else None
    cut = CutOptions(dtype=dtype, format=wanted.format, quant=wanted.quant, cut_quant=wanted.cut_quant)
    cut.check()
    if wanted.format != GGUF:
        if wanted.model is not None:
            raise UsageError("--model has no effect without --format gguf", hint="add --format gguf, or leave it out")
        return plan_options
    # Types of a GGUF file have to do with files. Nothing else of a plan needs more than the atlas.
    from surgery.cut.gguf.size import in_format

    return in_format(plan_options, cut, atlas.blocks, wanted.model)


def plan_and_warn(atlas: Atlas, options: PlanOptions) -> PruningPlan:
    """Make a plan from ``atlas``, and tell its warnings, and the sparsity that a size came to."""
    from surgery.planning.plan import make_plan

    plan = make_plan(atlas, options)
    if plan.sized is not None:
        say(str(plan.sized))
    for warning in plan.warnings:
        warn(warning)
    return plan


def expect_and_warn(plan: PruningPlan, recovery: str | None = None) -> Expectation:
    """Find the measured cuts nearest to ``plan``, and warn if it lies outside of what was measured.

    Args:
        recovery: Name of the recovery; None if it is not chosen yet.
    """
    from surgery.planning.expect import asked_of, expect

    expectation = expect(asked_of(plan, recovery))
    if expectation.warning:
        warn(expectation.warning)
    return expectation


def print_plan(plan: PruningPlan, talk: PrintOptions, expectation: Expectation) -> None:
    """Print ``plan``: one row for each layer, then the totals and the nearest measured cuts."""
    from surgery.planning.plan import layer_rows
    from surgery.result.record import plan_json, summary_rows

    if talk.json:
        print_json(plan_json(plan) | {"expected": expectation.to_json()})
        return
    print_table(*layer_rows(plan))
    print_line()
    print_pairs([*summary_rows(plan), *expectation.rows])
