"""One metric against another over the channels of an FFN. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chanfmt.algebra.compare import rank_correlation
from chanfmt.algebra.labels import supernode_count, top_indices
from chanfmt.analysis.association import chance_jaccard


@dataclass(frozen=True, eq=False)
class Scatter:
    """Two metrics of one FFN.

    Attributes:
        correlation: Spearman's rank correlation over the channels for which both metrics are known.
        top: Number of channels in each top set, among the channels for which both metrics are known.
        shared: Number of channels in both top sets.
        jaccard: Jaccard index of the two top sets.
        chance: Expected Jaccard index of two random sets of that size.
        left_out: Number of channels that are not shown: unknown, and on log axes also zero or negative.
        x, y: Positions of the shown channels in [0, 1], float64 (points,).
        channels: Ids of the shown channels, int64 (points,).
        ranges: Ends of the x axis and of the y axis: log10 of the metric on log axes, ranks otherwise.
    """

    correlation: float
    top: int
    shared: int
    jaccard: float
    chance: float
    left_out: int
    x: np.ndarray
    y: np.ndarray
    channels: np.ndarray
    ranges: tuple[tuple[float, float], tuple[float, float]]


def make_scatter(x: np.ndarray, y: np.ndarray, rho: float, *, log: bool) -> Scatter:
    """``x`` against ``y``, floating point (channel,) each: on log axes if ``log``, otherwise by rank, largest last."""
    # A column may be measured for few channels. Channels that it says nothing of belong to no top set.
    both = np.flatnonzero(~np.isnan(x) & ~np.isnan(y))
    top = min(supernode_count(len(x), rho), len(both))
    sets = [set(top_indices(values[both], top).tolist()) for values in (x, y)]
    shared = len(sets[0] & sets[1])
    known = np.isfinite(x) & np.isfinite(y) & (((x > 0) & (y > 0)) if log else True)
    channels = np.flatnonzero(known)
    places = [np.log10(values[known].astype(np.float64)) if log else _ranks(values[known]) for values in (x, y)]
    ranges = [(float(item.min()), float(item.max())) if len(item) else (0.0, 0.0) for item in places]
    scaled = [
        (item - low) / (high - low) if high > low else np.full(len(item), 0.5)
        for item, (low, high) in zip(places, ranges, strict=True)
    ]
    return Scatter(
        rank_correlation(x.astype(np.float64), y.astype(np.float64)),
        top,
        shared,
        shared / (2 * top - shared) if top else float("nan"),
        chance_jaccard(len(both), top) if top else float("nan"),
        len(x) - len(channels),
        scaled[0],
        scaled[1],
        channels,
        (ranges[0], ranges[1]),
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.arange(1, len(values) + 1)
    return ranks
