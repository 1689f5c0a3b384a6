"""The paper's definitions as functions of arrays (arXiv 2604.23475; spec section "Labels").

Pure numpy, float64 inside. Each function takes one layer with m channels and d residual dimensions. The
lowest index wins a tie, so that labels do not depend on the order in which a sort leaves equal values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chanfmt.format import schema

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.format.records import LabelSettings


def top_indices(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` largest ``values`` (1-D), ascending; ties to the lowest index."""
    order = np.argsort(-np.asarray(values, dtype=np.float64), kind="stable")
    return np.sort(order[:count])


def supernode_count(n_channels: int, rho: float) -> int:
    """max(1, floor(rho m)): the paper's tables use 143 of 14,336, not the text's ceiling.

    >>> supernode_count(14336, 0.01), supernode_count(8, 0.01)
    (143, 1)
    """
    # The small relative slack keeps 0.29 * 100 from flooring to 28.
    return min(n_channels, max(1, int(np.floor(rho * n_channels * (1 + 1e-12)))))


def supernodes(lp: np.ndarray, rho: float) -> np.ndarray:
    """Definition 1: the ``supernode_count`` channels of largest LP. Ascending indices."""
    return top_indices(lp, supernode_count(len(lp), rho))


def write_mass(write: np.ndarray, core: np.ndarray) -> np.ndarray:
    """Sum of |write[:, core]|: how much the supernodes ``core`` write to each residual dimension, float64 (d,).

    The sum of the masses of all FFNs of one layer chooses the dimensions that the next layer is judged by.
    """
    return np.abs(write[:, core]).sum(axis=1, dtype=np.float64)


def write_support(write: np.ndarray, core: np.ndarray, size: int) -> np.ndarray:
    """Equation 5: the ``size`` residual dimensions that the supernodes write to most.

    Args:
        write: Write vectors as columns, (d, m).
        core: Supernode indices.
        size: K; all d dimensions if K is larger.

    Returns:
        Ascending dimension indices, (min(K, d),).
    """
    mass = write_mass(write, core)
    return top_indices(mass, min(size, len(mass)))


def support_sizes(dimensions: int, size: int) -> tuple[int, ...]:
    """Write support sizes that an atlas keeps connectivity for: powers of two below d, and ``size`` itself."""
    powers = {2**exponent for exponent in range(4, dimensions.bit_length()) if 2**exponent < dimensions}
    return tuple(sorted(powers | {size}))


def connectivity(write: np.ndarray, core: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Equation 6 for write supports of several sizes.

    Args:
        write: Write vectors as columns, (d, m).
        core: Supernode indices.
        sizes: Write support sizes K, ascending.

    Returns:
        Share of each write vector's L1 norm on the support of each size, float64 (sizes, m); 0 for a zero vector.
    """
    magnitude = np.abs(write)
    total = magnitude.sum(axis=0, dtype=np.float64)
    inside = np.zeros(magnitude.shape[1])
    seen = np.empty(0, dtype=np.int64)
    shares = []
    for size in sizes:
        support = write_support(write, core, size)
        inside = inside + magnitude[np.setdiff1d(support, seen, assume_unique=True)].sum(axis=0, dtype=np.float64)
        seen = support
        shares.append(_share(inside, total))
    return np.stack(shares)


def read_connectivity(reads: list[np.ndarray], support: np.ndarray) -> np.ndarray:
    """Definition 3: share of the read rows' joint L1 norm on the previous layer's support, (m,).

    Args:
        reads: Gate and up weights, each (m, d).
        support: Write support of the previous layer.
    """
    inside = np.zeros(len(reads[0]))
    total = np.zeros(len(reads[0]))
    for weight in reads:
        magnitude = np.abs(weight)
        inside += magnitude[:, support].sum(axis=1, dtype=np.float64)
        total += magnitude.sum(axis=1, dtype=np.float64)
    return _share(inside, total)


def halo(conn: np.ndarray, core: np.ndarray, eta: float) -> np.ndarray:
    """Definition 2: the floor(eta (m - n_super)) best connected channels outside the core, ascending."""
    others = np.setdiff1d(np.arange(len(conn)), core, assume_unique=True)
    count = int(np.floor(eta * len(others) * (1 + 1e-12)))
    return others[top_indices(conn[others], count)]


def pearson(
    cross: np.ndarray,
    sum_a: np.ndarray,
    sum_a2: np.ndarray,
    sum_b: np.ndarray,
    sum_b2: np.ndarray,
    count: int,
) -> np.ndarray:
    """Pearson correlations from raw sums over ``count`` samples.

    Args:
        cross: Sums of a_i b_j, (m, c).
        sum_a, sum_a2: Sums of a_i and a_i^2, (m,).
        sum_b, sum_b2: Sums of b_j and b_j^2, (c,).

    Returns:
        (m, c) in [-1, 1]; 0 if a_i or b_j does not vary. No epsilon is added: covariances of q are
        about 1e-16, and an absolute epsilon would turn the correlation into a covariance.
    """
    if count < 2:
        return np.zeros(cross.shape)
    covariance = cross / count - np.outer(sum_a / count, sum_b / count)
    deviation_a = _deviation(sum_a, sum_a2, count)
    deviation_b = _deviation(sum_b, sum_b2, count)
    # Two divisions keep the product of two tiny deviations from underflowing.
    scaled = np.divide(covariance, deviation_a[:, None], out=np.zeros_like(covariance), where=deviation_a[:, None] > 0)
    result = np.divide(scaled, deviation_b[None, :], out=np.zeros_like(covariance), where=deviation_b[None, :] > 0)
    return np.clip(result, -1.0, 1.0)


def pair_redundancy(correlation: np.ndarray) -> np.ndarray:
    """Equation 8: -1/2 log(1 - max(r, 0)^2) in nats, at most `chanfmt.format.schema.MAX_REDUNDANCY`."""
    positive = np.maximum(correlation, 0.0)
    rest = np.maximum((1.0 - positive) * (1.0 + positive), np.finfo(np.float64).eps)
    return -0.5 * np.log(rest) + 0.0


def redundancy_to_core(correlation: np.ndarray, core: np.ndarray, top_k: int) -> np.ndarray:
    """Equation 9: mean of the ``top_k`` largest pair redundancies to the core, (m,).

    Args:
        correlation: (m, c), one column per member of ``core``.
        core: Channel indices of the columns, (c,). A channel is not compared with itself.
        top_k: k; fewer if the core has fewer other members. The result is NaN if it has no other member.
    """
    pairs = pair_redundancy(correlation)
    pairs[core, np.arange(len(core))] = -1.0
    ordered = -np.sort(-pairs, axis=1)[:, :top_k]
    valid = ordered >= 0
    counts = valid.sum(axis=1)
    sums = np.where(valid, ordered, 0.0).sum(axis=1)
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def nearest_in_core(correlation: np.ndarray, core: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` members of the core that each channel is most redundant with, the largest pair redundancy first.

    Args:
        correlation, core: As for `redundancy_to_core`.

    Returns:
        Channel ids, int32 (count, m), and pair redundancies, float32 (count, m); -1 and NaN in the remaining places if the
        core has fewer members of positive redundancy.
    """
    pairs = pair_redundancy(correlation)
    pairs[core, np.arange(len(core))] = -1.0
    return _largest(pairs.T, core, count)


def written_dimensions(write: np.ndarray, support: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` dimensions of the write ``support`` that each channel writes to most.

    Args:
        write: Write vectors as columns, (d, m).

    Returns:
        Dimensions, int32 (count, m), and their share of the write vector's L1 norm, float32 (count, m); -1 and NaN in the
        remaining places if the channel writes to fewer dimensions of the support.
    """
    total = np.abs(write).sum(axis=0, dtype=np.float64)
    shares = np.divide(np.abs(write[support]), total, out=np.zeros((len(support), write.shape[1])), where=total > 0)
    return _largest(shares, support, count)


def _largest(values: np.ndarray, names: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``names`` (n,) of the ``count`` largest positive ``values`` (n, m) in each column, and these values."""
    left, columns = values.copy(), np.arange(values.shape[1])
    ids = np.full((count, values.shape[1]), -1, dtype=np.int32)
    best = np.full(ids.shape, np.nan, dtype=np.float32)
    # Finding a few maxima is faster than sorting all values, and argmax takes the first of equal values.
    for place in range(min(count, len(values))):
        rows = left.argmax(axis=0)
        found = left[rows, columns]
        ids[place] = np.where(found > 0, names[rows], -1)
        best[place] = np.where(found > 0, found, np.nan)
        left[rows, columns] = -1.0
    return ids, best


def protection(redundancy: np.ndarray, halo_channels: np.ndarray, alpha: float, gamma: float) -> np.ndarray:
    """Equation 10: alpha + (1 - alpha)(1 - r^gamma) in the halo, 1 outside it, (m,).

    r is the ascending rank of redundancy within the halo, scaled to [0, 1]. A channel whose
    redundancy is unknown (NaN) keeps the factor 1 and takes no rank.
    """
    factor = np.ones(len(redundancy))
    known = halo_channels[~np.isnan(redundancy[halo_channels])]
    if len(known) > 1:
        rank = np.empty(len(known))
        rank[np.argsort(redundancy[known], kind="stable")] = np.arange(len(known))
        factor[known] = alpha + (1 - alpha) * (1 - (rank / (len(known) - 1)) ** gamma)
    return factor


def label_ffn(
    score: np.ndarray, conn: np.ndarray | None, redundancy: np.ndarray | None, settings: LabelSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and protection factors of one FFN, from what an atlas stores (spec section "Labels").

    Args:
        score: The metric that ranks supernodes, (m,); all NaN if no token reached the FFN.
        conn: Connectivity, (m,); None if it is unknown, and then the FFN has no halo.
        redundancy: Redundancy, (m,), may be NaN; None if it is unknown.

    Returns:
        Labels, uint8 (m,); protection, float32 (m,).
    """
    labels = np.full(len(score), schema.LABEL_NONE, dtype=np.uint8)
    factor = np.ones(len(score), dtype=np.float32)
    if np.isnan(score).all():
        return labels, factor
    core = supernodes(score, settings.rho)
    if conn is not None:
        halo_channels = halo(conn, core, settings.eta)
        labels[halo_channels] = schema.LABEL_HALO
        if redundancy is not None:
            factor = protection(redundancy, halo_channels, settings.alpha, settings.gamma).astype(np.float32)
    labels[core] = schema.LABEL_SUPERNODE
    return labels, factor


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)


def _deviation(total: np.ndarray, total_squares: np.ndarray, count: int) -> np.ndarray:
    power = total_squares / count
    variance = power - (total / count) ** 2
    # A smaller difference is only the rounding of its own terms, so the channel does not vary.
    return np.sqrt(np.where(variance > 1e-13 * power, variance, 0.0))
