"""Measure an experiment's conditions, row by row, and tell what they say together."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.narrate import progress_bar, say
from chanfmt.format import schema
from surgery.evaluation.perplexity import perplexity_text
from surgery.experiments.ablation.experiment import masses, total
from surgery.experiments.results import Results, channels_sha256, finite, losses_of
from surgery.planning.selectors import by_label

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chanfmt.format.reader import Atlas
    from surgery.experiments.ablation.experiment import Condition, Experiment
    from surgery.experiments.subject import Subject

ABLATION_FORMAT = "ablation/1"
MEASURED = ("channels", "supernodes_removed", "lp_removed", "delta_nll", "delta_standard_error")
LOSSES = ("perplexity", "nll", "standard_error", "tokens", "seconds")


def run(
    atlas: Atlas, subject: Subject, experiment: Experiment, directory: Path, *, overwrite: bool = False
) -> tuple[Results, list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure every condition of ``experiment``, the dense model first, that ``directory`` has no row for.

    Args:

    Returns:
        All rows in ``directory``; those of the conditions in their order, the dense model's first; and the summary.

    Raises:
        UsageError: The rows in ``directory`` are of something else.
        KeyboardInterrupt: Ctrl-C; its text says that finished rows stay.
    """
    columns = (*experiment.key, *experiment.extra, *MEASURED, *experiment.concluded, *LOSSES)
    identity = subject.identity | {"experiment": experiment.name} | dict(experiment.identity)
    results = Results(directory, ABLATION_FORMAT, identity, columns, experiment.key, overwrite=overwrite)
    core, mass = by_label(atlas, schema.LABEL_SUPERNODE), masses(atlas)
    dense = experiment.dense
    digests = {id(item): channels_sha256(item.removed, experiment.means) for item in (dense, *experiment.conditions)}

    def found(condition: Condition) -> dict[str, Any] | None:
        return results.find(condition.key, digests[id(condition)])

    pending = [item for item in (dense, *experiment.conditions) if found(item) is None]
    done = len(digests) - len(pending)
    if done:
        say(f"{done} of {len(digests)} rows are in {directory} already")
    try:
        with progress_bar(len(subject.token_ids) * len(pending), "tok", experiment.name) as bar:
            for condition in pending:
                losses = results.losses(digests[id(condition)])
                if losses is None:
                    losses = subject.measure(condition.removed, experiment.means, bar.update)
                else:
                    bar.update(len(subject.token_ids))
                row: dict[str, Any] = {**condition.key, **condition.extra, **losses} | {
                    "channels": int(total(condition.removed)),
                    "supernodes_removed": int(total({index: mask & core[index] for index, mask in condition.removed.items()})),
                    "lp_removed": total(condition.removed, mass),
                    "channels_sha256": digests[id(condition)],
                }
                reference = row if condition is dense else found(condition.reference or dense)
                # References come first, so their rows are there.
                assert reference is not None
                row |= _difference(row, reference)
                results.add(row | (dict.fromkeys(experiment.concluded) if condition is dense else experiment.conclude(row)))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(results.rows)} finished rows are in {directory}; the same command continues") from None
    rows = [there for item in (dense, *experiment.conditions) if (there := found(item)) is not None]
    summary = experiment.summarise(rows[1:]) if experiment.summarise else _means(rows[1:], experiment.groups)
    results.write(summary=summary)
    return results, rows, summary


def _difference(row: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """What the loss rose by, over the same blocks."""
    from surgery.evaluation.perplexity import BlockLosses

    losses, before = losses_of(row), losses_of(reference)
    # A difference of means over the same blocks is the mean of the differences, and so is its standard error.
    gaps = BlockLosses(losses.nll - before.nll, losses.predicted)
    return {"delta_nll": gaps.mean, "delta_standard_error": finite(gaps.standard_error)}


def _means(rows: Sequence[Mapping[str, Any]], groups: tuple[str, ...]) -> list[dict[str, Any]]:
    """Mean costs by ``groups``, over layers and seeds."""
    alike: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        alike[tuple(row[name] for name in groups)].append(row)
    return [
        dict(zip(groups, key, strict=True))
        | {
            "rows": len(some),
            "channels": float(np.mean([row["channels"] for row in some])),
            "supernodes_removed": float(np.mean([row["supernodes_removed"] for row in some])),
            "lp_removed": float(np.mean([row["lp_removed"] for row in some])),
            "delta_nll": float(np.mean([row["delta_nll"] for row in some])),
            "median_delta_nll": float(np.median([row["delta_nll"] for row in some])),
            "perplexity": finite(float(np.exp(np.mean([row["nll"] for row in some])))),
        }
        for key, some in alike.items()
    ]


def table(experiment: Experiment, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
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
    """Headings and rows for people."""
    headings = list(summary[0]) if summary else []
    return [name.replace("_", " ") for name in headings], [[_cell(row[name]) for name in headings] for row in summary]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
