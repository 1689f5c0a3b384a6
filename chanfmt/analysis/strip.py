"""A layer's mass along its channels as a strip of bins, by rank on a log axis or by index."""

from __future__ import annotations

import numpy as np

FLOOR = 0.01
"""Lowest share that a strip shows, as a multiple of the layer's mean share per channel."""


def cumulative(values: np.ndarray) -> np.ndarray:
    """Running share of the sum of ``values`` (n,) with a leading zero, (n + 1,); all zeros if the sum is not positive."""
    sums = np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))
    return sums / sums[-1] if sums[-1] > 0 else np.zeros(len(sums))


def bin_edges(channels: int, samples: int, *, log: bool) -> np.ndarray:
    """Edges of ``samples`` bins over ``channels`` positions, float64 (samples + 1,), from 0 to ``channels``.

    With ``log``, rank r covers [log r, log(r + 1)), so the first channels are wide.
    """
    ticks = np.linspace(0.0, 1.0, samples + 1)
    return (channels + 1.0) ** ticks - 1.0 if log else channels * ticks


def strip_shares(values: np.ndarray, samples: int, *, log: bool) -> np.ndarray:
    """Mean share of the layer's mass per channel in each bin, (samples,).

    With ``log``, the channels are in descending order on a log axis. Otherwise they are in the order of their index.
    """
    known = np.where(np.isfinite(values), values, 0)
    curve = cumulative(np.sort(known)[::-1] if log else known)
    edges = bin_edges(len(values), samples, log=log)
    return np.diff(np.interp(edges, np.arange(len(curve)), curve)) / np.diff(edges)


def strip_levels(shares: np.ndarray, channels: int, steps: int) -> np.ndarray:
    """Shares as levels on a log scale, int64 (samples,): 0 is nothing, ``steps`` is close to the whole layer."""
    floor = FLOOR / channels
    scaled = np.log(np.maximum(shares, 1e-300) / floor) / np.log(1.0 / floor)
    return np.clip(np.ceil(scaled * steps), 0, steps).astype(np.int64)
