"""Weight statistics of one FFN: its matrices and their norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import nn

    from chanfmt.models.ffn import Matrix, Member


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
        "write_norm": np.sqrt(np.square(weights.write, dtype=np.float64).sum(axis=0)),
        "write_norm_l1": np.abs(weights.write).sum(axis=0, dtype=np.float64),
    }
    for role, rows in weights.reads.items():
        result[f"{role}_norm"] = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1))
    return result


def wanda_group(weights: FFNWeights, read_power: np.ndarray, write_power: np.ndarray) -> np.ndarray:
    """Sum over gate row, up row and write column of |W| times the RMS of each weight's own input, (m,).

    Args:
        read_power: E[x^2] of the reads' input, (d,).
        write_power: E[u^2], (m,).
    """
    scale = np.sqrt(read_power)
    result = np.abs(weights.write).sum(axis=0, dtype=np.float64) * np.sqrt(write_power)
    for rows in weights.reads.values():
        result += np.abs(rows) @ scale
    return result


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.cpu()
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).numpy()
