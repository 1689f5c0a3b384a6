"""Intervals for medians over FFNs. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Middle:
    """Median and extremes of ``count`` known values, and the bootstrap interval of the median (2.5% to 97.5%)."""

    count: int
    median: float
    low: float
    high: float
    smallest: float
    largest: float


def middle(values: np.ndarray, clusters: np.ndarray | None = None, *, replicates: int = 2000, seed: int = 0) -> Middle:
    """`Middle` of ``values`` (n,) without unknown values.

    All numbers are NaN if no value is known. The interval is NaN if all values are in one cluster.

    Args:
        clusters: Number of the cluster that each value belongs to, int (n,), such as the FFN of every expert. A cluster is
            resampled as a whole. None makes each value its own cluster.

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
        # A sample may have thousands of experts, so the samples are drawn in blocks.
        medians = np.concatenate(
            [_medians(ordered, member, random.integers(0, count, (100, count))) for _ in range(replicates // 100)]
        )
        low, high = (float(value) for value in np.quantile(medians, [0.025, 0.975]))
    return Middle(len(known), float(np.median(known)), low, high, float(known.min()), float(known.max()))


def _medians(ordered: np.ndarray, member: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Medians of samples of the ascending values (n,): each value counts as often as its cluster is in ``drawn``.

    Args:
        ordered: Values, ascending, (n,).
        member: Cluster of each value, (n,).
        drawn: Clusters of each sample, (sample, cluster).
    """
    times = np.stack([np.bincount(row, minlength=drawn.shape[1]) for row in drawn])[:, member]
    ends = np.cumsum(times, axis=1)
    total = ends[:, -1:]
    middles = [ordered[(ends >= place).argmax(axis=1)] for place in ((total + 1) // 2, total // 2 + 1)]
    return np.mean(middles, axis=0)
