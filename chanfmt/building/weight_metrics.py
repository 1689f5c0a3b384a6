"""The metrics of a channel that its weights decide: norms, and the Wanda score of its group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from chanfmt.models.matrices import FFNWeights

_PART = 1 << 20
"""Elements of a matrix that are worked on at a time."""


def norms(weights: FFNWeights) -> dict[str, np.ndarray]:
    """``write_norm``, ``write_norm_l1``, ``up_norm`` and, for a gated FFN, ``gate_norm``; float64 (m,)."""
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
    """Sums over the rows of ``function`` applied to the elements, float64 (m,)."""
    return np.sum([function(part).sum(axis=0, dtype=np.float64) for part in _parts(matrix)], axis=0)


def _parts(matrix: np.ndarray) -> list[np.ndarray]:
    """Runs of rows of ``matrix``. A float64 copy of one run is small beside the matrix."""
    step = max(1, _PART // max(1, matrix.shape[1]))
    return [matrix[start : start + step] for start in range(0, len(matrix), step)]
