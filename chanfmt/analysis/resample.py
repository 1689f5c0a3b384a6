"""Intervals for medians over FFNs. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Middle:
    """The median of ``count`` known values, their extremes, and the median's bootstrap interval (2.5% to 97.5%)."""

    count: int
    median: float
    low: float
    high: float
    smallest: float
    largest: float


def middle(values: np.ndarray, clusters: np.ndarray | None = None, *, replicates: int = 2000, seed: int = 0) -> Middle:
    """`Middle` of ``values`` (n,), the unknown left out; NaN where none is known, no interval for a single cluster.

    Args:
        clusters: What is resampled as a whole, int (n,), such as the FFN of every expert; each value by itself without.

    >>> middle(np.array([3.0, 1.0, 2.0, np.nan])).median
    2.0
    """
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    known = values[finite]
    if not len(known):
        return Middle(0, *[float("nan")] * 5)
    member = np.arange(len(known)) if clusters is None else np.unique(clusters[finite], return_inverse=True)[1]
    order = np.argsort(known, kind="stable")
    ordered, member = known[order], member[order]
    count = int(member.max()) + 1
    low = high = float("nan")
    if count > 1:
        random = np.random.default_rng(seed)
        # Of thousands of experts each, in blocks.
        medians = np.concatenate(
            [_medians(ordered, member, random.integers(0, count, (100, count))) for _ in range(replicates // 100)]
        )
        low, high = (float(value) for value in np.quantile(medians, [0.025, 0.975]))
    return Middle(len(known), float(np.median(known)), low, high, float(known.min()), float(known.max()))


def _medians(ordered: np.ndarray, member: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Medians of the ascending values (n,) of the clusters ``drawn`` (sample, cluster), each as often as it was drawn."""
    times = np.stack([np.bincount(row, minlength=drawn.shape[1]) for row in drawn])[:, member]
    ends = np.cumsum(times, axis=1)
    total = ends[:, -1:]
    middles = [ordered[(ends >= place).argmax(axis=1)] for place in ((total + 1) // 2, total // 2 + 1)]
    return np.mean(middles, axis=0)
