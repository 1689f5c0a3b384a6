"""Definitions of `chanfmt.algebra.labels` on tensors, so that they are computed on the device of the numbers.

The results are those of `chanfmt.algebra.labels` up to the rounding of float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from chanfmt.format import schema

if TYPE_CHECKING:
    from chanfmt.building.statistics import PairSums


def share(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """``part / whole``; 0 where ``whole`` is 0."""
    return torch.where(whole > 0, part / whole, 0.0)


def largest(values: torch.Tensor, names: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``names`` (n,) of the ``count`` largest positive ``values`` (n, m) in each column, and these values.

    Returns:
        int32 (count, m) and float32 (count, m); -1 and NaN in the remaining places of a column with fewer positive values.
    """
    left = values.clone()
    ids = torch.full((count, values.shape[1]), -1, dtype=torch.int32, device=values.device)
    best = torch.full(ids.shape, torch.nan, dtype=torch.float32, device=values.device)
    # Of equal values, max gives the first. topk and sort promise nothing.
    for place in range(min(count, len(values))):
        found, rows = left.max(0)
        ids[place] = torch.where(found > 0, names[rows].int(), -1)
        best[place] = torch.where(found > 0, found, torch.nan)
        left.scatter_(0, rows[None], -1.0)
    return ids.cpu().numpy(), best.cpu().numpy()


def pair_redundancies(sums: PairSums, columns: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """Pair redundancies (equation 8) of all channels to members of the core, float64 (m, c); -1 of a channel to itself.

    Args:
        sums: Cross moments with the candidates.
        columns: Positions of the core's members among the candidates, (c,).
        core: These members, channel indices (c,).
    """
    cross, other = sums.cross.index_select(1, columns), sums.other.index_select(1, columns)
    covariance = (cross / sums.count).addr_(sums.channel[0] / sums.count, other[0] / sums.count, alpha=-1)
    deviation, deviations = _deviation(sums.channel, sums.count), _deviation(other, sums.count)
    # Two divisions keep the product of two tiny deviations from underflowing.
    correlation = share(share(covariance, deviation[:, None]), deviations).clamp_(0.0, 1.0)
    rest = (1.0 - correlation).mul_(1.0 + correlation).clamp_min_(float(np.finfo(np.float64).eps))
    pairs = rest.log_().mul_(-0.5).add_(0.0)
    pairs[core, torch.arange(len(core), device=core.device)] = -1.0
    return pairs


def redundancy_to_core(pairs: torch.Tensor, top_k: int) -> torch.Tensor:
    """Equation 9 from `pair_redundancies`: the mean of the ``top_k`` largest, (m,); NaN if the core has no other member."""
    ordered = pairs.topk(min(top_k, pairs.shape[1]), dim=1).values
    counts = (ordered >= 0).sum(1)
    return torch.where(counts > 0, ordered.clamp_min(0.0).sum(1) / counts, torch.nan)


def nearest_in_core(pairs: torch.Tensor, core: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The members of ``core`` that each channel is most redundant with, as `largest` gives them, from `pair_redundancies`."""
    return largest(pairs.T.contiguous(), core, schema.NEAREST)


def _deviation(sums: torch.Tensor, count: int) -> torch.Tensor:
    """Standard deviations (n,) from the sums of values and of their squares (2, n)."""
    mean, power = sums / count
    variance = power - mean.square()
    # A smaller difference is only the rounding of its own terms, so the channel does not vary.
    return torch.where(variance > 1e-13 * power, variance, 0.0).sqrt()
