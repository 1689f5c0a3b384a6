"""Would other calibration text have given the same supernodes? The sums of each split answer this. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from chanfmt.algebra.labels import supernode_count, top_indices
from chanfmt.analysis.association import chance_jaccard

BLOCK = 32
"""Bootstrap replicates that are computed at once."""


@dataclass(frozen=True)
class Agreement:
    """Mean Jaccard index of the supernodes of disjoint parts of the text.

    Attributes:
        tokens: Mean tokens in a part.
        jaccard: Mean index over all pairs of parts.
        pairs: Number of pairs.
    """

    tokens: float
    jaccard: float
    pairs: int


@dataclass(frozen=True)
class Stability:
    """One FFN's supernodes over splits of the calibration text.

    Splits count as exchangeable. Text of another kind may differ by more.

    Attributes:
        splits: Splits with tokens.
        top_share: Share of the LP mass in the top rho, from all splits.
        top_share_error: Its jackknife standard error over splits.
        top_share_low, top_share_high: Its bootstrap interval, 2.5% to 97.5%.
        leave_one_out: Mean Jaccard index of the supernodes from all splits with the supernodes from all splits but one.
        persistence: Share of bootstrap replicates in which a supernode stays a supernode, mean over supernodes.
        core: Supernodes that stay supernodes in at least 95% of the replicates.
        supernodes: Number of supernodes.
        by_tokens: `Agreement` of disjoint parts, from the smallest parts to the largest.
        chance: Expected Jaccard index of sets drawn at random.
    """

    splits: int
    top_share: float
    top_share_error: float
    top_share_low: float
    top_share_high: float
    leave_one_out: float
    persistence: float
    core: int
    supernodes: int
    by_tokens: tuple[Agreement, ...]
    chance: float


def stability(sums: np.ndarray, tokens: np.ndarray, rho: float, *, replicates: int = 200, seed: int = 0) -> Stability | None:
    """`Stability` of one FFN; None if fewer than two splits have tokens, or if the FFN has no mass.

    Args:
        sums: Sum of q^2 over the tokens of each split, (split, channel).
        tokens: Tokens of each split that reached the FFN, (split,).
        replicates: Bootstrap samples of splits.
    """
    sums = np.asarray(sums, dtype=np.float64)[np.asarray(tokens) > 0]
    tokens = np.asarray(tokens)[np.asarray(tokens) > 0]
    splits = len(sums)
    if splits < 2 or not np.isfinite(sums).all() or sums.sum() <= 0:
        return None
    whole = sums.sum(axis=0)
    size = supernode_count(len(whole), rho)
    top = top_indices(whole, size)
    left_out = whole - sums
    shares = np.array([_share(row, size) for row in left_out])
    weights = np.random.default_rng(seed).multinomial(splits, np.full(splits, 1 / splits), replicates)
    found = np.zeros(len(whole), dtype=np.int64)
    replicate_shares = np.empty(replicates)
    for start in range(0, replicates, BLOCK):
        block = weights[start : start + BLOCK] @ sums
        # The choice among equal values does not change a share, and changes persistence only if LP is zero.
        tops = np.argpartition(-block, size - 1, axis=1)[:, :size]
        np.add.at(found, tops.ravel(), 1)
        masses = block.sum(axis=1)
        replicate_shares[start : start + BLOCK] = np.take_along_axis(block, tops, axis=1).sum(axis=1) / masses
    low, high = np.quantile(replicate_shares, [0.025, 0.975])
    persistence = found[top] / replicates
    return Stability(
        splits=splits,
        top_share=_share(whole, size),
        top_share_error=float(np.sqrt((splits - 1) / splits * np.square(shares - shares.mean()).sum())),
        top_share_low=float(low),
        top_share_high=float(high),
        leave_one_out=float(np.mean([_jaccard(top, top_indices(row, size)) for row in left_out])),
        persistence=float(persistence.mean()),
        core=int((persistence >= 0.95).sum()),
        supernodes=size,
        by_tokens=tuple(_by_tokens(sums, tokens, size)),
        chance=chance_jaccard(len(whole), size),
    )


def _by_tokens(sums: np.ndarray, tokens: np.ndarray, size: int) -> list[Agreement]:
    found = []
    part = 1
    while 2 * part <= len(sums):
        parts = len(sums) // part
        grouped = sums[: parts * part].reshape(parts, part, -1).sum(axis=1)
        tops = [top_indices(row, size) for row in grouped]
        pairs = [_jaccard(first, second) for first, second in combinations(tops, 2)]
        found.append(Agreement(float(tokens[: parts * part].sum() / parts), float(np.mean(pairs)), len(pairs)))
        part *= 2
    return found


def _share(values: np.ndarray, size: int) -> float:
    mass = float(values.sum())
    return float(np.partition(values, len(values) - size)[len(values) - size :].sum()) / mass if mass > 0 else float("nan")


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)
