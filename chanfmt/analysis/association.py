"""How far two metrics of one FFN agree on the top channels. Pure numpy."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from chanfmt.algebra.compare import expected_jaccard
from chanfmt.algebra.labels import supernode_count, top_indices


@dataclass(frozen=True)
class Overlap:
    """The top sets of two metrics, of equal size.

    Attributes:
        size: Channels in each.
        shared: Channels in both.
        jaccard: Shared channels over channels in at least one set.
        chance: Expectation of ``jaccard`` for sets drawn at random.
    """

    size: int
    shared: int
    jaccard: float
    chance: float


def top_overlap(first: np.ndarray, second: np.ndarray, rho: float) -> Overlap:
    """`Overlap` of the top ``rho`` of two metrics (channel,), over the channels whose two values are known.

    If no channel is known, the sets are empty and the indices are NaN.

    >>> top_overlap(np.array([4.0, 3.0, 2.0, 1.0]), np.array([4.0, 1.0, 2.0, 3.0]), rho=0.5).shared
    1
    """
    known = np.isfinite(first) & np.isfinite(second)
    channels = int(known.sum())
    if not channels:
        return Overlap(0, 0, float("nan"), float("nan"))
    size = supernode_count(channels, rho)
    shared = len(np.intersect1d(top_indices(first[known], size), top_indices(second[known], size), assume_unique=True))
    return Overlap(size, shared, shared / (2 * size - shared), chance_jaccard(channels, size))


@functools.lru_cache(maxsize=1024)
def chance_jaccard(channels: int, size: int) -> float:
    """Expected Jaccard index of two sets of ``size`` channels drawn at random."""
    return expected_jaccard(channels, [size], [size])
