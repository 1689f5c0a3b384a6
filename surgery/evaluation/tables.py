"""The tables that `surgery eval` prints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base.text import beginning, perplexity_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from surgery.evaluation.measured import Evaluation

LONGEST_ANSWER = 160
"""Characters of an answer in a table; JSON has all of them."""
Table = tuple[list[str], list[list[str]]]
"""Headings and rows."""


def evaluation_tables(evaluations: Sequence[Evaluation]) -> list[Table]:
    """Headings and rows for people: the models; then comparisons with the first model, cuts, tasks and answers, if there are any."""
    names = _names(evaluations)
    found = [_model_table(evaluations, names)]
    if any(item.comparison for item in evaluations):
        found.append(_comparison_table(evaluations, names))
    if any(item.cut for item in evaluations):
        found.append(_cut_table(evaluations, names))
    if any(item.tasks for item in evaluations):
        found.append(_task_table(evaluations, names))
    return [*found, *_answer_tables(evaluations, names)]


def _names(evaluations: Sequence[Evaluation]) -> list[str]:
    """The last part of each model's name; the whole names if two of the parts are equal."""
    short = [Path(item.model).name or item.model for item in evaluations]
    return short if len(set(short)) == len(short) else [item.model for item in evaluations]


def _model_table(evaluations: Sequence[Evaluation], names: list[str]) -> Table:
    memory = "peak VRAM" if any(item.memory != "rss" for item in evaluations) else "peak RSS"
    bos = any(item.with_bos for item in evaluations)
    headings = [
        "model",
        "params",
        "perplexity",
        *(["with BOS"] if bos else []),
        "nats/token",
        "std err",
        "bits/byte",
        "tokens/s",
        memory,
    ]
    rows = []
    for item, name in zip(evaluations, names, strict=True):
        bits, peak = item.bits_per_byte, item.peak_memory_bytes
        rows.append(
            [
                name,
                _count(item.parameters),
                perplexity_text(item.losses.perplexity),
                *([perplexity_text(item.with_bos.perplexity) if item.with_bos else "-"] if bos else []),
                f"{item.losses.mean:.4f}",
                _number(item.losses.standard_error),
                "-" if bits is None else f"{bits:.4f}",
                f"{item.tokens_per_second:,.0f}",
                "-" if peak is None else f"{peak / (1 << 20):,.0f} MiB",
            ]
        )
    return headings, rows


def _comparison_table(evaluations: Sequence[Evaluation], names: list[str]) -> Table:
    headings = [f"against {names[0]}", "nats/token", "95% interval", "perplexity", "95% interval"]
    rows = []
    for item, name in zip(evaluations[1:], names[1:], strict=True):
        row = [name, "-", "-", "-", "-"]
        if item.comparison:
            ratio, low, high = item.comparison.ratio
            row[1:] = [
                f"{item.comparison.difference:+.4f}",
                _interval(item.comparison.low, item.comparison.high, "+.4f"),
                _ratio(ratio),
                "-" if math.isnan(low) else f"{_ratio(low)} to {_ratio(high)}",
            ]
        rows.append(row)
    return headings, rows


def _cut_table(evaluations: Sequence[Evaluation], names: list[str]) -> Table:
    headings = ["cut", "method", "protected", "supernodes removed"]
    return headings, [
        [name, item.cut["method"], ", ".join(item.cut["protect"]) or "none", _supernodes(item.cut)]
        for item, name in zip(evaluations, names, strict=True)
        if item.cut
    ]


def _task_table(evaluations: Sequence[Evaluation], names: list[str]) -> Table:
    headings = ["task", "metric", "model", "value", "std err", "items", "shots"]
    rows = []
    # The rows of one metric stand together, one per model.
    for key in dict.fromkeys((result.task, result.metric, result.filter) for item in evaluations for result in item.tasks):
        for item, name in zip(evaluations, names, strict=True):
            for result in item.tasks:
                if (result.task, result.metric, result.filter) == key:
                    metric = result.metric if result.filter == "none" else f"{result.metric} ({result.filter})"
                    rows.append(
                        [
                            result.task,
                            metric,
                            name,
                            f"{result.value:.4f}",
                            _number(result.standard_error),
                            "-" if result.items is None else f"{result.items:,}",
                            "-" if result.shots is None else str(result.shots),
                        ]
                    )
    return headings, rows


def _answer_tables(evaluations: Sequence[Evaluation], names: list[str]) -> list[Table]:
    """A table for each prompt: one answer per model."""
    tables = []
    for of_prompt in zip(*(item.answers for item in evaluations), strict=True):
        answers = (item.answer for item in of_prompt)
        headings, *rows = answer_rows(of_prompt[0].prompt, zip(names, answers, strict=True))
        tables.append((headings, rows))
    return tables


def answer_rows(prompt: str, answers: Iterable[tuple[str, str]]) -> list[list[str]]:
    """``prompt``, then the beginning of each of ``answers``, of a model's name and its answer."""
    return [
        ["prompt", beginning(prompt, LONGEST_ANSWER)],
        # In quotes, an answer that begins with a digit is not flush right as a number would be.
        *([name, f'"{beginning(answer, LONGEST_ANSWER)}"'] for name, answer in answers),
    ]


def _supernodes(cut: dict[str, Any]) -> str:
    lost, total = cut["supernodes_removed"], cut["supernodes"]
    return f"{lost:,} of {total:,} ({lost / total:.1%})" if total else "-"


def _count(count: int) -> str:
    if count < 1e6:
        return f"{count:,}"
    return f"{count / 1e9:,.2f}B" if count >= 1e9 else f"{count / 1e6:,.1f}M"


def _ratio(value: float) -> str:
    return f"x{value:.3f}" if value < 1000 else f"x{value:.3g}"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def _interval(low: float, high: float, form: str) -> str:
    return "-" if math.isnan(low) else f"{low:{form}} to {high:{form}}"
