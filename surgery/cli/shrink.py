"""`surgery shrink`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.cli.framework import PrintOptions, add_command, parse_options, print_json, print_line, print_pairs, print_table
from surgery.cli.push import PublishingOptions

if TYPE_CHECKING:
    import argparse

    from surgery.cli.shrinking.outcome import Shrunk


EXAMPLES = (
    "surgery shrink meta-llama/Llama-3.2-1B --to 75% -o llama-small",
    "surgery shrink SmolLM2.gguf --to 100M -o small --calib pydoc --dry-run",
    "surgery shrink ./model --to 12GB -o small --atlas hf://USER/model-atlas --push",
)


def add(commands: Any) -> None:
    add_command(
        commands,
        "shrink",
        "from a model to a smaller one that is checked, compared and judged",
        run=_run,
        options=_options,
        examples=EXAMPLES,
        description=(
            "Make a model smaller: measure it, try a few cuts, apply the best one, recover it, and compare both models. Every step "
            "is a command that is printed before it runs. After an interruption, the same command goes on at the first step that "
            "is not done."
        ),
    )


def _options() -> tuple[type, ...]:
    from surgery.cli.shrinking import options

    return (
        options.ShrinkOptions,
        options.MeasureOptions,
        options.CutsOptions,
        options.JudgeOptions,
        PublishingOptions,
        options.DryRunOptions,
    )


def _run(arguments: argparse.Namespace) -> None:
    from surgery.cli.shrinking import options
    from surgery.cli.shrinking.shrink import foresee, shrink

    dry_run = parse_options(arguments, options.DryRunOptions).dry_run
    publishing, talk = parse_options(arguments, PublishingOptions), parse_options(arguments, PrintOptions)
    request = options.Request(
        parse_options(arguments, options.ShrinkOptions),
        parse_options(arguments, options.MeasureOptions),
        parse_options(arguments, options.CutsOptions),
        parse_options(arguments, options.JudgeOptions),
        None if publishing.push is None else options.Publication(publishing.push, publishing.public, publishing.create_pr),
    )
    request.check()
    publishing.check(login=not dry_run)
    foreseen = foresee(request, begin=not dry_run)
    if not dry_run:
        _tell(shrink(foreseen, quiet=talk.quiet), talk)
        return
    commands = [step.command for step in foreseen.steps]
    if talk.json:
        print_json({"estimate": foreseen.expected.to_json(), "expected": foreseen.nearest.to_json(), "commands": commands})
        return
    print_pairs(foreseen.rows)
    print_line()
    for command in commands:
        print_line(command)


def _tell(shrunk: Shrunk, talk: PrintOptions) -> None:
    """Print the cuts that were tried, the losses, the answers, the size, the verdict, and what to do next."""
    from surgery.cli.shrinking.outcome import candidate_rows
    from surgery.evaluation.tables import answer_rows
    from surgery.planning.sizes import count_text, size_text
    from surgery.result.verdict import loss_table

    if talk.json:
        print_json(shrunk.to_json())
        return
    report, verdict = shrunk.result.report, shrunk.verdict
    before, after = report.parameters_before, report.parameters_after
    if shrunk.tried:
        print_table(*candidate_rows(shrunk.tried))
        print_line()
    print_table(*loss_table(verdict))
    for pair in verdict.answers:
        print_line()
        print_pairs(answer_rows(pair.prompt, (("dense", pair.dense), ("smaller", pair.result))))
    print_line()
    print_pairs(
        [
            [
                "size",
                f"{count_text(before)} to {count_text(after)} parameters ({after / before:.1%}), {size_text(report.bytes_after)}",
            ],
            ["output", f"{shrunk.result.directory} (the steps' results are in {shrunk.work})"],
            ["verdict", verdict.sentence()],
            *([name, command] for name, command in shrunk.next.items()),
        ]
    )
