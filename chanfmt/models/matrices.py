"""Weight statistics of one FFN: its matrices and their norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from chanfmt.models.ffn import Matrix, Member

_PART = 1 << 20
"""Elements of a matrix that are worked on at a time."""


@dataclass(frozen=True)
class FFNWeights:
    """The weights of one dense FFN or one expert, channel by channel.

    Attributes:
        write: Write vectors as columns, (d, m).
        reads: Role (``gate``, ``up``) to read rows, (m, d).
    """

    write: np.ndarray
    reads: dict[str, np.ndarray]


def ffn_weights(model: nn.Module, member: Member) -> FFNWeights:
    """Weights of ``member`` on the CPU, float32 (float64 where the model is)."""
    width = member.write.matrix.inputs
    reads: dict[str, np.ndarray] = {}
    for read in member.reads:
        # An adapter beside a read projection has rows of its own, in a space of its own.
        if read.role not in reads:
            reads[read.role] = _numpy(matrix_of(model, read.projection.matrix)[read.start :: read.step][:width])
    return FFNWeights(_numpy(matrix_of(model, member.write.matrix)), reads)


def matrix_of(model: nn.Module, matrix: Matrix) -> torch.Tensor:
    """``matrix`` as (outputs, inputs), a view of its parameter."""
    weight = model.get_parameter(matrix.parameter).detach()
    if matrix.index is not None:
        weight = weight[matrix.index]
    elif weight.shape != (matrix.outputs, matrix.inputs) and not matrix.transposed:
        weight = weight[matrix.row : matrix.row + matrix.outputs]
    elif weight.shape != (matrix.inputs, matrix.outputs) and matrix.transposed:
        weight = weight[matrix.row : matrix.row + matrix.inputs]
    return weight.T if matrix.transposed else weight


def norms(weights: FFNWeights) -> dict[str, np.ndarray]:
    """``write_norm``, ``write_norm_l1``, ``up_norm`` and, where gated, ``gate_norm``; float64 (m,)."""
    result = {
        "write_norm": np.sqrt(_column_sums(weights.write, lambda part: np.square(part, dtype=np.float64))),
        "write_norm_l1": _column_sums(weights.write, np.abs),
    }
    for role, rows in weights.reads.items():
        result[f"{role}_norm"] = np.sqrt(np.concatenate([np.square(part, dtype=np.float64).sum(axis=1) for part in _parts(rows)]))
    return result


def wanda_group(weights: FFNWeights, read_power: np.ndarray, write_power: np.ndarray) -> np.ndarray:
    """Sum over gate row, up row and write column of |W| times the RMS of each weight's own input, (m,).

    Args:
        read_power: E[x^2] of the reads' input, (d,).
        write_power: E[u^2], (m,).
    """
    scale = np.sqrt(read_power)
    result = _column_sums(weights.write, np.abs) * np.sqrt(write_power)
    for rows in weights.reads.values():
        result += np.concatenate([np.abs(part) @ scale for part in _parts(rows)])
    return result


def _column_sums(matrix: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Sums over rows of ``function`` of the elements, float64."""
    return np.sum([function(part).sum(axis=0, dtype=np.float64) for part in _parts(matrix)], axis=0)


def _parts(matrix: np.ndarray) -> list[np.ndarray]:
    """Runs of rows, so that what is computed of them in float64 is small beside the matrix."""
    step = max(1, _PART // max(1, matrix.shape[1]))
    return [matrix[start : start + step] for start in range(0, len(matrix), step)]


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.cpu()
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).numpy()
