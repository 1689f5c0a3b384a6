"""Everything that an atlas knows about one channel, compared with the other channels of its FFN. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.algebra.labels import supernode_count, supernodes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Standing:
    """One metric of the channel beside the FFN's other channels. An unknown value is NaN and has rank 0.

    Attributes:
        rank: 1 for the largest value; equal values share the smallest of their ranks.
        known: Channels of the FFN whose value is known.
        below: Share of the FFN's known channels with a smaller value.
        times_median: Value over the FFN's median; NaN if the median is not positive.
    """

    name: str
    value: float
    rank: int
    known: int
    below: float
    times_median: float


@dataclass(frozen=True)
class Split:
    """The channel in one split of the calibration text: its LP, its rank, and whether it is a supernode there."""

    lp: float
    rank: int
    supernode: bool


@dataclass(frozen=True)
class Card:
    """One channel.

    Attributes:
        metrics: Every metric that the atlas holds.
        splits: Every split; empty if the atlas holds no sums by split.
        partners: Supernodes that the channel is most redundant with, their pair redundancy in nats, and their rank by LP.
        dimensions: Dimensions of the write support that the channel writes to most, and their share of its write vector.
        supports: Size of the write support, share of the channel's write vector on it, and the FFN's median share;
            empty if the atlas does not hold these shares.
    """

    metrics: tuple[Standing, ...]
    splits: tuple[Split, ...]
    supports: tuple[tuple[int, float, float], ...]
    partners: tuple[tuple[int, float, int], ...]
    dimensions: tuple[tuple[int, float], ...]

    @property
    def variation(self) -> float:
        """Standard deviation of LP over splits, divided by the mean; NaN with fewer than two splits."""
        values = np.array([split.lp for split in self.splits if np.isfinite(split.lp)])
        return float(values.std(ddof=1) / values.mean()) if len(values) > 1 and values.mean() > 0 else float("nan")


def make_card(
    metrics: Mapping[str, np.ndarray], series: Mapping[str, np.ndarray], sizes: Sequence[int], channel: int, rho: float
) -> Card:
    """The `Card` of ``channel``.

    Args:
        metrics: Metrics of the FFN by name, ``lp`` among them, (channel,).
        series: Variables of `chanfmt.format.schema.SERIES` that the atlas holds, for the FFN, (n,) or (n, channel).
        sizes: Sizes of the write support that ``connectivity_at`` refers to.
        rho: Share of channels that are supernodes.
    """
    splits = (
        ()
        if not {"sum_q2_split", "tokens_split"} <= set(series)
        else tuple(
            _split(values, float(count), channel, rho)
            for values, count in zip(series["sum_q2_split"], series["tokens_split"], strict=True)
        )
    )
    supports = (
        ()
        if "connectivity_at" not in series
        else tuple(
            (size, float(values[channel]), _median(values)) for size, values in zip(sizes, series["connectivity_at"], strict=True)
        )
    )
    # The supernodes that a channel is redundant with are ranked by LP. Without LP there are none.
    lp = metrics.get("lp", np.empty(0))
    # A file may name channels that do not exist.
    partners = tuple(
        (other, value, int((lp > lp[other]).sum()) + 1)
        for other, value in _nearest(series, channel, "redundancy_partner", "redundancy_pair")
        if other < len(lp)
    )
    return Card(
        tuple(_standing(name, values, channel) for name, values in metrics.items()),
        splits,
        supports,
        partners,
        tuple(_nearest(series, channel, "write_dimension", "write_share")),
    )


def _nearest(series: Mapping[str, np.ndarray], channel: int, ids: str, values: str) -> list[tuple[int, float]]:
    if ids not in series or values not in series:
        return []
    pairs = zip(series[ids][:, channel].tolist(), series[values][:, channel].tolist(), strict=True)
    return [(int(name), value) for name, value in pairs if name >= 0]


def _median(values: np.ndarray) -> float:
    return float(np.nanmedian(values)) if np.isfinite(values).any() else float("nan")


def _standing(name: str, values: np.ndarray, channel: int) -> Standing:
    value, known = float(values[channel]), int(np.isfinite(values).sum())
    if not np.isfinite(value):
        return Standing(name, value, 0, known, float("nan"), float("nan"))
    median = float(np.nanmedian(values))
    times = value / median if median > 0 else float("nan")
    return Standing(name, value, int((values > value).sum()) + 1, known, float((values < value).sum()) / known, times)


def _split(sums: np.ndarray, tokens: float, channel: int, rho: float) -> Split:
    if tokens <= 0:
        return Split(float("nan"), 0, False)
    count = supernode_count(len(sums), rho)
    own = float(sums[channel])
    rank = int((sums > own).sum()) + 1
    return Split(0.5 * own / tokens, rank, rank <= count and channel in supernodes(sums, rho))
