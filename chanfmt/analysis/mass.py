"""How much of a layer's importance sits in few channels. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chanfmt.algebra.labels import supernode_count


@dataclass(frozen=True)
class Concentration:
    """Concentration of one non-negative metric over one layer's channels.

    Attributes:
        mass: Sum over channels.
        top_share: Share of ``mass`` in the top ``rho`` of the channels.
        effective_channels: (sum x)^2 / sum x^2, the number of channels that effectively carry the mass.
        max_over_mean: Largest value over the mean.
        gini: Gini coefficient in [0, 1).
    """

    mass: float
    top_share: float
    effective_channels: float
    max_over_mean: float
    gini: float


def cumulative_share(values: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Share of the sum of ``values`` in the largest of them, float64 (point,).

    Between two whole numbers of channels, the share is interpolated. Unknown values do not count. A layer without mass gives
    NaN.

    Args:
        values: One non-negative metric of one layer, (channel,).
        fractions: Shares of the channels in [0, 1], (point,).

    >>> cumulative_share(np.array([1.0, 6.0, 1.0, 0.0]), np.array([0.25, 0.5, 1.0])).tolist()
    [0.75, 0.875, 1.0]
    """
    values = np.asarray(values, dtype=np.float64)
    ordered = np.sort(values[np.isfinite(values)])[::-1]
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    if not sums[-1] > 0:
        return np.full(len(fractions), np.nan)
    return np.interp(np.asarray(fractions) * len(ordered), np.arange(len(sums)), sums / sums[-1])


def concentration(values: np.ndarray, rho: float = 0.01) -> Concentration:
    """`Concentration` of ``values`` (channel,). A layer without mass gives zeros; NaN or infinity among the values give NaN.

    >>> found = concentration(np.array([6.0, 1.0, 1.0, 0.0]), rho=0.25)
    >>> found.mass, found.top_share, found.max_over_mean
    (8.0, 0.75, 3.0)
    """
    # A file may hold anything, and numpy warns when it converts a signalling NaN.
    with np.errstate(invalid="ignore", over="ignore"):
        # Sorting before the conversion takes half the time of sorting float64.
        ordered = np.sort(values)[::-1].astype(np.float64)
        mass = float(ordered.sum())
    if not np.isfinite(mass):
        return Concentration(np.nan, np.nan, np.nan, np.nan, np.nan)
    if mass <= 0:
        return Concentration(0.0, 0.0, 0.0, 0.0, 0.0)
    shares = ordered / mass
    count = len(ordered)
    gini = float((count + 1 - 2 * (np.cumsum(shares[::-1])).sum()) / count)
    return Concentration(
        mass=mass,
        top_share=float(shares[: supernode_count(count, rho)].sum()),
        effective_channels=float(1.0 / np.square(shares).sum()),
        max_over_mean=float(shares[0] * count),
        gini=gini,
    )
