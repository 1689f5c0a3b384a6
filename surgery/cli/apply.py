"""`surgery apply`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from chanfmt.base.inputs import input_path
from chanfmt.cli.framework import PrintOptions, add_command, parse_options, print_json, print_line, print_pairs
from surgery.cli.options import CutOptions, parse_size
from surgery.planning.layouts import LAYOUTS

if TYPE_CHECKING:
    import argparse

    from surgery.cli.push import PublishingOptions
    from surgery.cut import options as cut
    from surgery.result.result import Result

EXAMPLES = (
    "surgery apply half.safetensors --model meta-llama/Llama-3.2-1B -o llama-half",
    "surgery apply half.safetensors --model ./tuned --fine-tune -o tuned-half",
    "surgery apply half.safetensors --model ./llama --atlas llama.h5 --recover lstsq -o llama-half",
)


@dataclass(frozen=True)
class PlanFileOptions:
    """Which plan."""

    plan: str = field(metadata={"help": "plan written by surgery plan", "positional": "PLAN", "kind": "plan"})


@dataclass(frozen=True)
class FineTuneOptions:
    """Which weights the plan accepts."""

    fine_tune: bool = field(
        default=False,
        metadata={
            "help": "accept other weights than the plan's: MODEL is a fine-tune of the plan's model, perhaps with another head",
        },
    )


@dataclass(frozen=True)
class PlanAtlasOptions:
    """Where the tokens of a recovery come from."""

    atlas: str | None = field(
        default=None,
        metadata={
            "help": "atlas that the plan was made from, a file or hf://REPO/FILE; --recover needs it, and the result gets a copy",
            "metavar": "ATLAS",
            "kind": "atlas",
        },
    )


@dataclass(frozen=True)
class LayoutOptions:
    """How the result is laid out."""

    layout: str | None = field(
        default=None,
        metadata={"help": "layout of the result, as for surgery plan (default: the plan's)", "choices": tuple(LAYOUTS)},
    )


def add(commands: Any) -> None:
    add_command(
        commands,
        "apply",
        "cut a model as a plan says",
        run=_run,
        options=_options,
        examples=EXAMPLES,
        description=(
            "Cut a model as a plan says. The plan is a file from surgery plan, or the kept_channels.safetensors of an earlier result."
        ),
    )


def _options() -> tuple[type, ...]:
    from surgery.recovery.options import RecoveryOptions

    return PlanFileOptions, CutOptions, LayoutOptions, FineTuneOptions, PlanAtlasOptions, RecoveryOptions


def _run(arguments: argparse.Namespace) -> int:
    from surgery.recovery.processes import run_command

    return run_command(partial(_cut, arguments))


def _cut(arguments: argparse.Namespace) -> None:
    from surgery.cut.prune import apply_file
    from surgery.recovery.options import RecoveryOptions

    options = parse_options(arguments, CutOptions)
    cut_options = as_data(
        options,
        fine_tune=parse_options(arguments, FineTuneOptions).fine_tune,
        layout=parse_options(arguments, LayoutOptions).layout,
    )
    result = apply_file(
        input_path(parse_options(arguments, PlanFileOptions).plan),
        options.model,
        options.output,
        cut_options,
        parse_options(arguments, RecoveryOptions),
        revision=options.revision,
        atlas=parse_options(arguments, PlanAtlasOptions).atlas,
    )
    tell(result, options, parse_options(arguments, PrintOptions))


def as_data(options: CutOptions, *, fine_tune: bool = False, layout: str | None = None) -> cut.CutOptions:
    """``options`` in the form that the library takes."""
    from surgery.cut import options as cut

    found = cut.CutOptions(
        options.overwrite,
        not options.no_verify,
        fine_tune,
        parse_size(options.shard_size),
        options.extra_layers,
        options.dtype,
        options.allow_padding,
        layout,
        options.format,
        options.quant,
        None if options.imatrix is None else input_path(options.imatrix),
        options.cut_quant,
    )
    found.check()
    return found


def tell(result: Result, options: CutOptions, talk: PrintOptions, publishing: PublishingOptions | None = None) -> None:
    """Print what was done, and push the result if ``publishing`` asks for it."""
    from surgery.result.push import PushOptions, push
    from surgery.result.record import summary_rows

    report, output = result.report, result.directory
    if not talk.json:
        print_pairs(summary_rows(report.plan, report))
        print_line()
        print_line(f"{output}: {report.sizes.headline}")
    where = {"output": str(output)}
    if publishing and publishing.push is not None:
        push_options = PushOptions(public=publishing.public, create_pr=publishing.create_pr, no_verify=options.no_verify)
        where["url"] = push(output, publishing.push or None, push_options).url
    if talk.json:
        print_json(report.to_json() | where)
    elif "url" in where:
        print_line(where["url"])
