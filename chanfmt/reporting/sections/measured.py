"""What was measured of single channels beside their scores: the loss without a channel, and how well its peers predict it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.algebra.compare import rank_correlation
from chanfmt.analysis.resample import middle
from chanfmt.base.text import one_line
from chanfmt.format import schema
from chanfmt.format.columns import ABLATIONS, REPLACEABILITY, REPLACEABILITY_NULL
from chanfmt.reporting import figures
from chanfmt.reporting.section import Plot, Section, Table
from chanfmt.reporting.units import name_columns
from chanfmt.reporting.words import bracketed, percent, times, with_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.format.unit import Unit

_FEWEST = 3
"""Channels with a measured loss that a rank correlation needs at least."""


def make(units: Sequence[Unit], tokens: int) -> Section | None:
    """Make the section about what was measured; None if the atlas has no such column.

    Args:
        tokens: Number of calibration tokens. The LP of an expert counts by its share of them.
    """
    sentences: list[str] = []
    numbers: dict[str, float | int] = {}
    plots: list[Plot] = []
    tables: list[Table] = []
    for name, what in ABLATIONS.items():
        kept = [unit for unit in units if len(unit.known(name))]
        if not kept:
            continue
        own = name.rpartition("/")[2]
        columns, channels = _by_ffn(name, kept, tokens), _by_channel(name, kept, tokens)
        found = middle(columns["spearman"], columns["ffn"])
        resolved = int((channels["loss"] > 2 * channels["error"]).sum())
        count, total = len(channels["loss"]), float(channels["loss"].sum())
        lp = float(channels["lp"].sum())
        numbers |= {f"{own}_channels": count, f"{own}_above_two_errors": resolved, f"{own}_sum": total}
        ratio = f", {times(total / lp)} times the sum of their LP" if lp > 0 else ""
        sentences.append(
            f"The loss was measured with one channel {what} at a time, for {count:,} channels of {len(kept)} FFNs "
            f"({one_line(_about(name, kept), 400)}). {resolved:,} of these losses rise by more than two standard errors. The rises "
            f"add up to {times(total)} nats per token{ratio}. A score says what a channel should cost, a protected set says what "
            "stays, and these losses say what single channels did cost on that text; they do not add up if many channels go."
        )
        if found.count:
            numbers[f"{own}_spearman_median"] = found.median
            sentences.append(
                f"The size of the measured loss and LP have a Spearman correlation of {with_interval(found, times)} in the median FFN."
            )
        plots.append(
            Plot(
                own,
                f"Measured change of the loss with one channel {what}, against its LP, with one standard error; line: a change "
                "equal to LP; hollow: the loss falls.",
                (f"{own}_channels",),
                (partial(figures.draw_ablation, lp=channels["lp"], change=channels["loss"], error=channels["error"]),),
                legend_below=True,
            )
        )
        tables += [Table(own, columns), Table(f"{own}_channels", channels)]
    kept = [unit for unit in units if len(unit.known(REPLACEABILITY))]
    if kept:
        columns = _replaceability(kept)
        tables.append(Table("replaceability", columns))
        parts = []
        for kind in schema.LABELS.values():
            found = middle(columns[kind], columns["ffn"])
            if found.count:
                numbers[f"replaceability_{kind}_median"] = found.median
                parts.append(f"{percent(found.median)}{bracketed(found, percent)} for {_PLURALS.get(kind, kind)}")
        chance = middle(columns["null"], columns["ffn"])
        beside = f" By chance it is {percent(chance.median)}." if chance.count else ""
        sentences.append(
            f"Replaceability is the share of a channel's variance that a linear map from other channels of its FFN explains on "
            f"held-out tokens ({one_line(_about(REPLACEABILITY, kept), 400)}). Its median over the measured channels is "
            f"{', '.join(parts)}.{beside}"
        )
    if not sentences:
        return None
    return Section(
        "measured",
        "Measured effects",
        text=tuple(sentences),
        numbers=numbers,
        plots=tuple(plots),
        tables=tuple(tables),
    )


_PLURALS = {"none": "other channels", "halo": "the halo", "supernode": "supernodes"}


def _about(name: str, units: Sequence[Unit]) -> str:
    """What the column was measured on, from its description."""
    text = next((metric.long_name for unit in units for metric in unit.stack.extension_metrics if metric.name == name), "")
    return text.partition("; ")[2] or text


def _lp(unit: Unit, tokens: int) -> np.ndarray:
    """LP per token of the model, float64 (channel,): what the removal of a channel should cost."""
    return unit.values("lp").astype(np.float64) * (unit.tokens / tokens if tokens else 1.0)


def _error(name: str, unit: Unit) -> np.ndarray:
    held = f"{name}_error"
    return unit.values(held).astype(np.float64) if unit.holds(held) else np.full(unit.n_channels, np.nan)


def _by_ffn(name: str, units: Sequence[Unit], tokens: int) -> dict[str, np.ndarray]:
    rows = []
    for unit in units:
        loss, lp, error = unit.values(name).astype(np.float64), _lp(unit, tokens), _error(name, unit)
        known = np.isfinite(loss) & np.isfinite(lp)
        several = known.sum() >= _FEWEST
        rows.append(
            {
                "measured": int(known.sum()),
                "above_two_errors": int((loss[known] > 2 * error[known]).sum()),
                "loss": float(loss[known].sum()),
                "lp": float(lp[known].sum()),
                "spearman": rank_correlation(np.abs(loss[known]), lp[known]) if several else float("nan"),
            }
        )
    return name_columns(units) | {key: np.array([row[key] for row in rows]) for key in rows[0]}


def _by_channel(name: str, units: Sequence[Unit], tokens: int) -> dict[str, np.ndarray]:
    ids = [np.flatnonzero(np.isfinite(unit.values(name)) & np.isfinite(unit.values("lp"))) for unit in units]
    counts = [len(found) for found in ids]
    values = {
        "loss": [unit.values(name).astype(np.float64) for unit in units],
        "error": [_error(name, unit) for unit in units],
        "lp": [_lp(unit, tokens) for unit in units],
    }
    return (
        {key: np.repeat(column, counts) for key, column in name_columns(units).items()}
        | {"channel": np.concatenate(ids)}
        | {key: np.concatenate([row[found] for row, found in zip(rows, ids, strict=True)]) for key, rows in values.items()}
    )


def _replaceability(units: Sequence[Unit]) -> dict[str, np.ndarray]:
    """Median replaceability of each FFN by label, and the median of its null."""
    columns: dict[str, list[float]] = {kind: [] for kind in (*schema.LABELS.values(), "null")}
    for unit in units:
        values, label = unit.values(REPLACEABILITY), unit.labels
        for number, kind in schema.LABELS.items():
            found = values[(label == number) & np.isfinite(values)]
            columns[kind].append(float(np.median(found)) if len(found) else float("nan"))
        null = unit.known(REPLACEABILITY_NULL)
        columns["null"].append(float(np.median(null)) if len(null) else float("nan"))
    return name_columns(units) | {kind: np.array(found) for kind, found in columns.items()}
