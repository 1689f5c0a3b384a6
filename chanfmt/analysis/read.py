"""Do the important channels of a layer read what the supernodes of the previous layer write? Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chanfmt.algebra.compare import rank_correlation
from chanfmt.algebra.labels import supernode_count, top_indices
from chanfmt.format import schema


@dataclass(frozen=True)
class ReadHalo:
    """Read connectivity of one FFN's channels, and what its read halo holds. Undefined numbers are NaN.

    The read halo is the share of the channels with the largest read connectivity.

    Attributes:
        supernodes, halo, others: Mean read connectivity by label.
        supernodes_in_read_halo: Share of the supernodes in the read halo.
        lp_in_read_halo: Share of the LP mass in the read halo.
        spearman: Rank correlation of read connectivity and LP.
        chance: Share of the channels in the read halo.
    """

    supernodes: float
    halo: float
    others: float
    supernodes_in_read_halo: float
    lp_in_read_halo: float
    spearman: float
    chance: float


def read_halo(lp: np.ndarray, labels: np.ndarray, read_connectivity: np.ndarray, share: float = 0.10) -> ReadHalo | None:
    """`ReadHalo` of one FFN, from arrays (channel,). Channels with an unknown value are left out.

    The result is None if no channel is left, as in the first FFN of a model.

    Args:
        share: Size of the read halo, as a share of the channels.
    """
    reads, lp, labels = np.asarray(read_connectivity), np.asarray(lp), np.asarray(labels)
    known = np.isfinite(reads) & np.isfinite(lp)
    if not known.any():
        return None
    reads, lp, labels = reads[known], lp[known].astype(np.float64), labels[known]
    core = labels == schema.LABEL_SUPERNODE
    chosen = np.zeros(len(reads), dtype=bool)
    size = supernode_count(len(reads), share)
    chosen[top_indices(reads, size)] = True
    mass = lp.sum()
    return ReadHalo(
        supernodes=_mean(reads[core]),
        halo=_mean(reads[labels == schema.LABEL_HALO]),
        others=_mean(reads[labels == schema.LABEL_NONE]),
        supernodes_in_read_halo=_mean(chosen[core]),
        lp_in_read_halo=float(lp[chosen].sum() / mass) if mass > 0 else float("nan"),
        spearman=rank_correlation(reads, lp),
        chance=size / len(reads),
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else float("nan")
