"""Is the halo more redundant with the supernodes than equally important channels, and than chance? Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chanfmt.analysis.controls import matched_control
from chanfmt.format import schema


@dataclass(frozen=True)
class HaloRedundancy:
    """Mean redundancy to the supernodes over three kinds of channels of one FFN, and two nulls of the same channels.

    The null pairs equal positions of two sequences, so it holds chance and the effect of the position. The null of chance pairs
    other positions, so it holds chance alone.

    Attributes:
        channels: Number of halo channels, and of matched channels.
        halo, halo_null, halo_chance: The halo.
        matched, matched_null, matched_chance: Channels outside halo and supernodes, each the nearest in LP to one halo channel.
        others, others_null, others_chance: All channels outside halo and supernodes.
    """

    channels: int
    halo: float
    halo_null: float
    halo_chance: float
    matched: float
    matched_null: float
    matched_chance: float
    others: float
    others_null: float
    others_chance: float


def halo_redundancy(
    lp: np.ndarray, labels: np.ndarray, redundancy: np.ndarray, null: np.ndarray | None, chance: np.ndarray | None = None
) -> HaloRedundancy | None:
    """`HaloRedundancy` of one FFN, from arrays (channel,).

    ``null`` is the atlas's ``redundancy_null``, and ``chance`` its column ``x_common/redundancy_chance``. Without an array, its
    means are NaN.

    Channels whose redundancy is unknown are left out. The result is None if the FFN has no halo, or fewer channels outside
    halo and supernodes than in the halo.
    """
    lp, labels, redundancy = np.asarray(lp), np.asarray(labels), np.asarray(redundancy)
    known = np.isfinite(redundancy) & np.isfinite(lp)
    halo = (labels == schema.LABEL_HALO) & known
    others = (labels == schema.LABEL_NONE) & known
    if not halo.any() or others.sum() < halo.sum():
        return None
    matched = matched_control(halo, others, lp)
    means = {}
    for name, values in (("", redundancy), ("_null", null), ("_chance", chance)):
        for kind, mask in (("halo", halo), ("matched", matched), ("others", others)):
            chosen = np.array([]) if values is None else np.asarray(values)[mask & np.isfinite(values)]
            means[kind + name] = float(chosen.mean(dtype=np.float64)) if len(chosen) else float("nan")
    return HaloRedundancy(channels=int(halo.sum()), **means)
