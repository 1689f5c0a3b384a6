"""What the living part of ``report.html`` shows: a heat map of every unit, and the channels of each. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.analysis.strip import strip_levels, strip_shares
from chanfmt.format import schema
from chanfmt.format.columns import NAME

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.format.unit import Unit

BINS = 120
"""Columns of the heat map."""
LEVELS = 255
"""Steps of the heat map's colours."""
MOST_UNITS = 160
"""Most units that the page holds. An atlas with more shows some of them, evenly spaced."""
TOP, SPREAD = 64, 64
"""Channels of a unit that the page holds: the largest by LP, and as many again, evenly spaced in rank."""
DIGITS = 4


@dataclass(frozen=True, eq=False)
class Explored:
    """One unit.

    Attributes:
        name: Layer, stack and expert in words.
        n_channels: Number of all its channels.
        shares: Mean share of the unit's LP in a channel, by rank in bins of a log axis, float64 (`BINS`,).
        channels: Ids of the channels that the page holds, by descending LP, int64 (channel,).
        ranks: Their ranks by LP from 1, int64 (channel,).
        labels: Their labels in words.
        values: Metric or column to their values (channel,).
    """

    name: str
    n_channels: int
    shares: np.ndarray
    channels: np.ndarray
    ranks: np.ndarray
    labels: tuple[str, ...]
    values: dict[str, np.ndarray]

    @property
    def heat(self) -> np.ndarray:
        """The shares on a log scale, float64 (`BINS`,): 0 is nothing, 1 is close to the whole unit."""
        return strip_levels(self.shares, self.n_channels, LEVELS) / LEVELS

    def as_json(self) -> dict[str, Any]:
        """JSON-ready data, with rounded values and None for unknown values."""
        return {
            "name": self.name,
            "n": self.n_channels,
            "shares": [float(f"{share:.{DIGITS}g}") for share in self.shares.tolist()],
            "channels": self.channels.tolist(),
            "ranks": self.ranks.tolist(),
            "labels": self.labels,
            "values": {
                name: values.tolist() if values.dtype.kind in "iu" else [_rounded(value) for value in values.tolist()]
                for name, values in self.values.items()
            },
        }


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None


def explored(units: Sequence[Unit], *, several_stacks: bool) -> tuple[Explored, ...]:
    """Every unit of ``units``, or `MOST_UNITS` of them, in model order."""
    chosen = np.unique(np.linspace(0, len(units) - 1, min(len(units), MOST_UNITS)).round().astype(int))
    return tuple(_unit(units[place], several_stacks=several_stacks) for place in chosen)


def _unit(unit: Unit, *, several_stacks: bool) -> Explored:
    lp = unit.values("lp").astype(np.float64)
    order = np.argsort(-lp, kind="stable")
    rows = np.arange(len(lp))
    if len(lp) > TOP + SPREAD:
        spread = np.geomspace(TOP + 1, len(lp), SPREAD).round().astype(int) - 1
        rows = np.unique(np.concatenate([rows[:TOP], spread]))
    channels = order[rows]
    labels = unit.values("label")[channels] if unit.holds("label") else np.zeros(len(channels), np.uint8)
    stack = f" {unit.stack.name}" if several_stacks else ""
    expert = "" if unit.expert is None else f", expert {unit.expert}"
    return Explored(
        name=f"layer {unit.layer}{stack}{expert}",
        n_channels=len(lp),
        shares=strip_shares(lp, BINS, log=True),
        channels=channels,
        ranks=rows + 1,
        labels=tuple(schema.LABELS.get(int(label), str(label)) for label in labels),
        values={name: unit.values(name)[channels] for name in _names(unit)},
    )


def _names(unit: Unit) -> list[str]:
    """Names of the metrics that ``unit`` holds, and of the columns that were added to it."""
    added = [metric.name for metric in unit.stack.extension_metrics if NAME.fullmatch(metric.name)]
    return [*(metric.name for metric in schema.METRICS if unit.holds(metric.name)), *added]
