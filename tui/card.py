"""All that an atlas knows of one channel. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanfmt import schema
from chanfmt.labels import supernode_count, supernodes

if TYPE_CHECKING:
    from tui.load import Snapshot


@dataclass(frozen=True)
class Standing:
    """One metric of the channel among those of its FFN; NaN, and rank 0, where it is unknown.

    Attributes:
        rank: 1 is the largest; equal values share the lowest.
        below: Share of the FFN's known channels with a smaller value.
        times_median: Value over the FFN's median; NaN where that is not positive.
    """

    name: str
    value: float
    rank: int
    known: int
    below: float
    times_median: float


@dataclass(frozen=True)
class Split:
    """The channel in one split of the calibration text: LP, its rank, whether it is a supernode there."""

    lp: float
    rank: int
    supernode: bool


@dataclass(frozen=True)
class Card:
    """One channel.

    Attributes:
        metrics: Every metric the atlas holds.
        splits: Empty where the atlas holds no sums by split.
        partners: Supernodes that it is most redundant with, their pair redundancy in nats, and their rank by LP.
        dimensions: Dimensions of the write support that it writes to most, and their share of its write vector.
        supports: Size of the write support, share of the channel's write vector on it, and the FFN's median share;
            empty where the atlas does not hold them.
    """

    metrics: tuple[Standing, ...]
    splits: tuple[Split, ...]
    supports: tuple[tuple[int, float, float], ...]
    partners: tuple[tuple[int, float, int], ...]
    dimensions: tuple[tuple[int, float], ...]

    @property
    def variation(self) -> float:
        """Standard deviation of the splits' LP over its mean, NaN without splits."""
        values = np.array([split.lp for split in self.splits if np.isfinite(split.lp)])
        return float(values.std(ddof=1) / values.mean()) if len(values) > 1 and values.mean() > 0 else float("nan")


def make_card(snapshot: Snapshot, ffn: int, channel: int) -> Card:
    """What ``snapshot`` says of ``channel`` of FFN ``ffn``."""
    metrics = tuple(_standing(name, snapshot.values(ffn, name), channel) for name in snapshot.metrics)
    sums, tokens = snapshot.series(ffn, "sum_q2_split"), snapshot.series(ffn, "tokens_split")
    splits = () if sums is None or tokens is None else tuple(
        _split(values, float(count), channel, snapshot.rho) for values, count in zip(sums, tokens, strict=True)
    )
    shares = snapshot.series(ffn, "connectivity_at")
    sizes = snapshot.supports[snapshot.ffns[ffn].stack]
    supports = () if shares is None else tuple(
        (size, float(values[channel]), _median(values)) for size, values in zip(sizes, shares, strict=True)
    )
    lp = snapshot.values(ffn, "lp")
    partners = tuple(
        (other, value, int((lp > lp[other]).sum()) + 1)
        for other, value in _nearest(snapshot, ffn, channel, "redundancy_partner", "redundancy_pair")
    )
    return Card(metrics, splits, supports, partners, tuple(_nearest(snapshot, ffn, channel, "write_dimension", "write_share")))


def _nearest(snapshot: Snapshot, ffn: int, channel: int, ids: str, values: str) -> list[tuple[int, float]]:
    found, of = snapshot.series(ffn, ids), snapshot.series(ffn, values)
    if found is None or of is None:
        return []
    pairs = zip(found[:, channel].tolist(), of[:, channel].tolist(), strict=True)
    return [(int(name), value) for name, value in pairs if name >= 0]


def labelled(label: int) -> str:
    """A label in words."""
    return schema.LABELS.get(label, str(label))


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
