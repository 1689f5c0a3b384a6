"""Rows and summary of an experiment as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.text import perplexity_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from surgery.experiments.ablation.experiment import Experiment


def rows_table(experiment: Experiment, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows for people, the dense model first."""
    names = (*experiment.key, *experiment.extra)
    headings = [*names, "channels", "supernodes", "LP", "nats/token", "+-", *experiment.concluded, "perplexity"]
    cells = []
    for row in rows:
        named = [_cell(row[name]) for name in names]
        if all(row[name] is None for name in experiment.key):
            named[0] = "dense"
        cells.append(
            [
                *named,
                f"{row['channels']:,}",
                f"{row['supernodes_removed']:,}",
                f"{row['lp_removed']:.3g}",
                f"{row['delta_nll']:+.3g}",
                _cell(row["delta_standard_error"]),
                *(_cell(row[name]) for name in experiment.concluded),
                perplexity_text(row["perplexity"]),
            ]
        )
    return headings, cells


def summary_table(summary: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a summary, for people."""
    headings = list(summary[0]) if summary else []
    return [name.replace("_", " ") for name in headings], [[_cell(row[name]) for name in headings] for row in summary]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
