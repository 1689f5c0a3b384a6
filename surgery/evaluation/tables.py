"""What `surgery eval` prints: JSON for machines, tables for people."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.evaluation.perplexity import perplexity_text
from surgery.evaluation.protocol import PROTOCOLS

if TYPE_CHECKING:
    from surgery.evaluation.evaluate import EvaluateOptions, Evaluation
    from surgery.evaluation.perplexity import Comparison

Table = tuple[list[str], list[list[str]]]


def report_data(options: EvaluateOptions, evaluations: list[Evaluation]) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "data": options.data,
        "seq_len": options.seq_len,
        "max_tokens": options.max_tokens,
        "protocol": {"name": options.protocol, "statement": PROTOCOLS[options.protocol].statement},
        "models": [_model_data(item, options) for item in evaluations],
    }


def _model_data(item: Evaluation, options: EvaluateOptions) -> dict[str, Any]:
    tokens, losses = item.tokens, item.losses
    return {
        "model": item.model,
        "fingerprint": item.fingerprint,
        "parameters": item.parameters,
        "text_tokens": tokens.text_tokens,
        "tokens": len(tokens.ids),
        "tokens_sha256": tokens.sha256,
        "predicted": int(losses.predicted.sum()),
        "predicted_bytes": tokens.predicted_bytes,
        "blocks": len(losses.nll),
        "nll": losses.mean,
        "nll_standard_error": losses.standard_error,
        "perplexity": losses.perplexity,
        "bits_per_byte": item.bits_per_byte,
        "against_first": _comparison_data(item.comparison, options.seed) if item.comparison else None,
        "seconds": item.seconds,
        "tokens_per_second": item.tokens_per_second,
        "peak_memory_bytes": item.peak_memory_bytes,
        "memory": item.memory,
        "cut": item.cut,
        "tasks": [asdict(result) for result in item.tasks],
    }


def _comparison_data(comparison: Comparison, seed: int) -> dict[str, Any]:
    ratio, low, high = comparison.ratio
    return {
        "nll_difference": comparison.difference,
        "nll_difference_interval": [comparison.low, comparison.high],
        "perplexity_ratio": ratio,
        "perplexity_ratio_interval": [low, high],
        "interval": f"percentile bootstrap over blocks, paired, {comparison.confidence:.0%}",
        "blocks": comparison.blocks,
        "resamples": comparison.resamples,
        "seed": seed,
    }


def coverage(options: EvaluateOptions, evaluations: list[Evaluation]) -> list[str]:
    """What the numbers are of, a line for each tokenisation."""
    lines = []
    for item in {item.tokens.sha256: item for item in reversed(evaluations)}.values():
        tokens, losses = item.tokens, item.losses
        size = "" if tokens.predicted_bytes is None else f" ({tokens.predicted_bytes:,} bytes)"
        blocks = f"{len(losses.nll):,} block{'' if len(losses.nll) == 1 else 's'} of {options.seq_len:,}"
        lines.append(
            f"{options.data}, protocol {options.protocol}: {len(tokens.ids):,} of {tokens.text_tokens:,} tokens in "
            f"{blocks}, {int(losses.predicted.sum()):,} predicted{size}"
        )
    return lines[::-1]


def tables(evaluations: list[Evaluation]) -> list[Table]:
    """Headings and rows for people: the models, the others against the first, cuts and tasks where there are any."""
    names = _names(evaluations)
    found = [_model_table(evaluations, names)]
    if any(item.comparison for item in evaluations):
        found.append(_comparison_table(evaluations, names))
    if any(item.cut for item in evaluations):
        found.append(_cut_table(evaluations, names))
    if any(item.tasks for item in evaluations):
        found.append(_task_table(evaluations, names))
    return found


def _names(evaluations: list[Evaluation]) -> list[str]:
    """The models' own names where no two are the same, else as they were given."""
    short = [Path(item.model).name or item.model for item in evaluations]
    return short if len(set(short)) == len(short) else [item.model for item in evaluations]


def _model_table(evaluations: list[Evaluation], names: list[str]) -> Table:
    memory = "peak VRAM" if any(item.memory == "cuda" for item in evaluations) else "peak RSS"
    headings = ["model", "params", "perplexity", "nats/token", "std err", "bits/byte", "tokens/s", memory]
    rows = []
    for item, name in zip(evaluations, names, strict=True):
        bits, peak = item.bits_per_byte, item.peak_memory_bytes
        rows.append(
            [
                name,
                _count(item.parameters),
                perplexity_text(item.losses.perplexity),
                f"{item.losses.mean:.4f}",
                _number(item.losses.standard_error),
                "-" if bits is None else f"{bits:.4f}",
                f"{item.tokens_per_second:,.0f}",
                "-" if peak is None else f"{peak / (1 << 20):,.0f} MiB",
            ]
        )
    return headings, rows


def _comparison_table(evaluations: list[Evaluation], names: list[str]) -> Table:
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


def _cut_table(evaluations: list[Evaluation], names: list[str]) -> Table:
    headings = ["cut", "method", "protected", "supernodes removed"]
    return headings, [
        [name, item.cut["method"], ", ".join(item.cut["protect"]) or "none", _supernodes(item.cut)]
        for item, name in zip(evaluations, names, strict=True)
        if item.cut
    ]


def _task_table(evaluations: list[Evaluation], names: list[str]) -> Table:
    headings = ["task", "metric", "model", "value", "std err", "items", "shots"]
    rows = []
    # One metric's models below each other.
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
