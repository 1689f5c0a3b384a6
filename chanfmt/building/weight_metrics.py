"""The metrics of a channel that its weights decide, computed on the device of the weights, in one pass over each matrix.

A large model has hundreds of matrices. On a GPU, copying them to the CPU would take longer than measuring the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from chanfmt.algebra import labels
from chanfmt.building.on_device import largest, share
from chanfmt.format import schema

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from chanfmt.models.matrices import FFNWeights

_CPU_PART, _GPU_PART = 1 << 17, 1 << 25
"""Elements of a matrix that are worked on at a time: what fits in the cache of a core, and what keeps a GPU busy."""


@dataclass(frozen=True)
class Reading:
    """What the read projections decide, float64 (m,).

    Attributes:
        norms: ``up_norm`` and, for a gated FFN, ``gate_norm``.
        connectivity: Definition 3; see `chanfmt.algebra.labels.read_connectivity`. NaN without a support.
        wanda: The reads' part of ``wanda_group``.
    """

    norms: Mapping[str, np.ndarray]
    connectivity: np.ndarray
    wanda: np.ndarray


@dataclass(frozen=True)
class Writing:
    """What the write projection decides. Without a core, all but the norms is undefined.

    Attributes:
        norm, norm_l1: Norms of the write vectors, float64 (m,).
        connectivity: For each size of the support, float64 (sizes, m); see `chanfmt.algebra.labels.connectivity`.
        dimension, share: See `chanfmt.algebra.labels.written_dimensions`.
        mass: See `chanfmt.algebra.labels.write_mass`.
    """

    norm: np.ndarray
    norm_l1: np.ndarray
    connectivity: np.ndarray
    dimension: np.ndarray
    share: np.ndarray
    mass: np.ndarray


def norms(weights: FFNWeights) -> dict[str, np.ndarray]:
    """``write_norm``, ``write_norm_l1``, ``up_norm`` and, for a gated FFN, ``gate_norm``; float64 (m,)."""
    sums = torch.zeros(2, weights.write.shape[1], dtype=torch.float64, device=weights.write.device)
    for _, magnitude in _magnitudes(weights.write):
        sums[0] += magnitude.sum(0)
        sums[1] += magnitude.square_().sum(0)
    found = {"write_norm": sums[1].sqrt(), "write_norm_l1": sums[0]}
    for role, rows in weights.reads.items():
        found[f"{role}_norm"] = torch.cat([magnitude.square_().sum(1) for _, magnitude in _magnitudes(rows)]).sqrt()
    return {name: values.cpu().numpy() for name, values in found.items()}


def reading(weights: FFNWeights, support: np.ndarray | None, power: torch.Tensor) -> Reading:
    """The metrics of the read projections.

    Args:
        support: Write support of the layer before, or None.
        power: E[x^2] of the reads' input, float64 (d,), on any device.
    """
    first = next(iter(weights.reads.values()))
    columns = torch.zeros(first.shape[1], 3, dtype=torch.float64, device=first.device)
    columns[:, 0] = 1.0
    columns[:, 1] = power.to(first.device).sqrt()
    if support is not None:
        columns[torch.from_numpy(support).to(first.device), 2] = 1.0
    sums = torch.zeros(first.shape[0], 3, dtype=torch.float64, device=first.device)
    norms = {}
    for role, rows in weights.reads.items():
        squares = torch.empty(len(rows), dtype=torch.float64, device=first.device)
        for part, magnitude in _magnitudes(rows):
            sums[part] += magnitude @ columns
            squares[part] = magnitude.square_().sum(1)
        norms[f"{role}_norm"] = squares.sqrt_().cpu().numpy()
    total, wanda, inside = sums.T
    connectivity = torch.full_like(total, torch.nan) if support is None else share(inside, total)
    return Reading(norms, connectivity.cpu().numpy(), wanda.cpu().numpy())


def writing(write: torch.Tensor, core: np.ndarray | None, support_size: int) -> Writing:
    """The metrics of the write projection ``write`` (d, m).

    Args:
        core: Supernode indices; None if no token reached the channels.
        support_size: Dimensions of the write support that labels rest on.
    """
    dimensions, width = write.shape
    sizes = labels.support_sizes(dimensions, support_size)
    chosen = torch.from_numpy(np.empty(0, dtype=np.int64) if core is None else core).to(write.device)
    mass = write.index_select(1, chosen).double().abs_().sum(1).cpu().numpy()
    order = np.argsort(-mass, kind="stable")
    # A support holds that of the next smaller size, so the sums over the dimensions that each size adds are enough.
    shells = torch.zeros(len(sizes) + 1, dimensions, dtype=torch.float64)
    for number, (start, stop) in enumerate(zip((0, *sizes), sizes, strict=False)):
        shells[number, torch.from_numpy(order[start:stop])] = 1.0
    shells[-1] = 1.0
    shells = shells.to(write.device)
    sums = torch.zeros(len(shells), width, dtype=torch.float64, device=write.device)
    squares = torch.zeros(width, dtype=torch.float64, device=write.device)
    for part, magnitude in _magnitudes(write):
        sums += shells[:, part] @ magnitude
        squares += magnitude.square_().sum(0)
    total = sums[-1]
    norm, norm_l1 = squares.sqrt().cpu().numpy(), total.cpu().numpy()
    if core is None:
        shape = (schema.NEAREST, width)
        none, undefined = np.full(shape, -1, dtype=np.int32), np.full(shape, np.nan, dtype=np.float32)
        return Writing(norm, norm_l1, np.full((len(sizes), width), np.nan), none, undefined, np.zeros(dimensions))
    support = torch.from_numpy(np.sort(order[:support_size])).to(write.device)
    shares = share(write.index_select(0, support).double().abs_(), total)
    dimension, best = largest(shares, support, schema.NEAREST)
    connectivity = share(sums[:-1].cumsum(0), total)
    return Writing(norm, norm_l1, connectivity.cpu().numpy(), dimension, best, mass)


def _magnitudes(matrix: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Runs of rows of ``matrix``, and the magnitudes of their elements in float64, which the caller may change."""
    step = max(1, (_CPU_PART if matrix.device.type == "cpu" else _GPU_PART) // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        part = slice(start, start + step)
        yield part, matrix[part].to(torch.float64, copy=True).abs_()
