"""`surgery eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.cli.framework import PrintOptions, add_command, parse_options, print_json, print_line, print_table

if TYPE_CHECKING:
    import argparse

EXAMPLES = (
    "surgery eval meta-llama/Llama-3.2-1B llama-half",
    "surgery eval ./model model-half --data pydoc --max-tokens 20000 --prompt 'Why is the sky blue?'",
    "surgery eval ./model model-half --tasks arc_easy,piqa --task-limit 200 --json",
)


def add(commands: Any) -> None:
    add_command(
        commands,
        "eval",
        "measure perplexity, speed, memory and answers of models",
        run=_run,
        options=_options,
        examples=EXAMPLES,
        description=(
            "Measure perplexity, speed and memory of one or more models on the same text, and compare them with the first. "
            "With --prompt, print their answers side by side."
        ),
    )


def _options() -> tuple[type, ...]:
    from surgery.evaluation.options import EvaluateOptions

    return (EvaluateOptions,)


def _run(arguments: argparse.Namespace) -> None:
    from surgery.evaluation.evaluate import evaluate
    from surgery.evaluation.options import EvaluateOptions

    options = parse_options(arguments, EvaluateOptions)
    evaluations = evaluate(options.models, options.data, **options.settings())
    if parse_options(arguments, PrintOptions).json:
        print_json(evaluations.to_json())
        return
    for line in evaluations.coverage():
        print_line(line)
    for table in evaluations.tables():
        print_line()
        print_table(*table)
