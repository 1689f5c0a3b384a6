"""`surgery eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import warn
from chanfmt.base.text import printable
from chanfmt.cli.framework import PrintOptions, add_command, parse_options, print_json, print_table

if TYPE_CHECKING:
    import argparse

EXAMPLES = (
    "surgery eval meta-llama/Llama-3.2-1B llama-half",
    "surgery eval ./model model-half --data pydoc --seq-len 512 --max-tokens 20000",
    "surgery eval ./model model-half --tasks arc_easy,piqa --task-limit 200 --json",
)


def add(commands: Any) -> None:
    add_command(
        commands,
        "eval",
        "measure perplexity, speed and memory of models on the same text",
        run=_run,
        options=_options,
        examples=EXAMPLES,
        description=(
            "Measure perplexity, speed and memory of one or more models on the same text, and compare them with the first."
        ),
    )


def _options() -> tuple[type, ...]:
    from surgery.evaluation.evaluate import EvaluateOptions

    return (EvaluateOptions,)


def _run(arguments: argparse.Namespace) -> None:
    from surgery.evaluation.evaluate import EvaluateOptions, evaluate
    from surgery.evaluation.tables import coverage, report_data, tables

    options = parse_options(arguments, EvaluateOptions)
    talk = parse_options(arguments, PrintOptions)
    evaluations = evaluate(options)
    if len({item.tokens.sha256 for item in evaluations}) > 1:
        # With --max-tokens, models with different tokenizers read different parts of the text.
        others = "" if options.max_tokens else "; bits per byte do"
        warn(f"the models' tokenizers differ, so their losses per token do not compare{others}")
    if talk.json:
        print_json(report_data(options, evaluations))
        return
    for line in coverage(options, evaluations):
        print(printable(line))
    for table in tables(evaluations):
        print()
        print_table(*table)
