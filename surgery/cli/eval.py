"""`surgery eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.text import printable
from chanfmt.cli.framework import parse_options, print_json, print_table
from surgery.cli.options import TalkOptions, add_command

if TYPE_CHECKING:
    import argparse


def add(commands: Any) -> None:
    from surgery.evaluation.options import EvaluateOptions

    add_command(
        commands, "eval", "perplexity, speed and memory of several models on the same text", _run, EvaluateOptions, TalkOptions
    )


def _run(arguments: argparse.Namespace) -> None:
    from surgery.evaluation.evaluate import evaluate
    from surgery.evaluation.options import EvaluateOptions

    options = parse_options(arguments, EvaluateOptions)
    evaluations = evaluate(options.models, options.data, **options.settings())
    if parse_options(arguments, TalkOptions).json:
        print_json(evaluations.to_json())
        return
    for line in evaluations.coverage():
        print(printable(line))
    for table in evaluations.tables():
        print()
        print_table(*table)
