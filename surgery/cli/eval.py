"""`surgery eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import warn
from chanfmt.base.text import printable
from chanfmt.cli.framework import parse_options, print_json, print_table
from surgery.cli.options import TalkOptions, add_command

if TYPE_CHECKING:
    import argparse


def add(commands: Any) -> None:
    from surgery.evaluation.evaluate import EvaluateOptions

    add_command(
        commands, "eval", "perplexity, speed and memory of several models on the same text", _run, EvaluateOptions, TalkOptions
    )


def _run(arguments: argparse.Namespace) -> None:
    from surgery.evaluation.evaluate import EvaluateOptions, evaluate
    from surgery.evaluation.tables import coverage, report_data, tables

    options = parse_options(arguments, EvaluateOptions)
    talk = parse_options(arguments, TalkOptions)
    evaluations = evaluate(options)
    if len({item.tokens.sha256 for item in evaluations}) > 1:
        # Beyond the same number of tokens two tokenizers read different parts of the text.
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
