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


def middle(values: np.ndarray, *, replicates: int = 2000, seed: int = 0) -> Middle:
    """`Middle` of ``values`` (n,), the unknown left out; NaN where none is known, no interval for a single one.

    >>> middle(np.array([3.0, 1.0, 2.0, np.nan])).median
    2.0
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    if not len(known):
        return Middle(0, *[float("nan")] * 5)
    low = high = float("nan")
    if len(known) > 1:
        random = np.random.default_rng(seed)
        # Of thousands of experts each, in blocks.
        medians = np.concatenate([
            np.median(known[random.integers(0, len(known), (100, len(known)))], axis=1) for _ in range(replicates // 100)
        ])
        low, high = (float(value) for value in np.quantile(medians, [0.025, 0.975]))
    return Middle(len(known), float(np.median(known)), low, high, float(known.min()), float(known.max()))
