"""Weight statistics of one FFN: its matrices and their norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from chanfmt.models.discover import FFN


@dataclass(frozen=True)
class FFNWeights:
    """The weights of one FFN, channel by channel.

    Attributes:
        write: Write vectors as columns, (d, m).
        reads: Role (``gate``, ``up``) to read rows, (m, d).
    """

    write: np.ndarray
    reads: dict[str, np.ndarray]


def ffn_weights(model: nn.Module, ffn: FFN) -> FFNWeights:
    """Weights of ``ffn`` on the CPU, float32 (float64 where the model is)."""
    write = _matrix(model.get_submodule(ffn.write))
    reads = {}
    for read in ffn.reads:
        rows = _matrix(model.get_submodule(read.module))[read.start :: read.step][: ffn.width]
        reads[read.role] = _numpy(rows)
    return FFNWeights(_numpy(write), reads)


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


def _matrix(module: nn.Module) -> torch.Tensor:
    """The weight as (outputs, inputs)."""
    weight: torch.Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(module, Conv1D) else weight


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.cpu()
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).numpy()
