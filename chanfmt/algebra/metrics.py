"""Metrics that follow from an atlas's sums (spec section "Metrics"). Pure numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping


def derive_metrics(sums: Mapping[str, np.ndarray], tokens: np.ndarray | np.int64) -> dict[str, np.ndarray]:
    """Token means of an atlas's sums, float32.

    Args:
        sums: ``sum_u2 sum_s2 sum_abs_q sum_q2``, float64 (layer[, expert], channel).
        tokens: Tokens behind each row, int64 (layer[, expert]).

    Returns:
        ``lp`` (equation 4), ``lp_factored``, ``activation_power``, ``curvature`` and ``taylor``;
        NaN in rows that no token reached.
    """
    count = np.asarray(tokens, dtype=np.float64)[..., None]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        mean = {name: np.where(count > 0, sums[name] / count, np.nan) for name in ("sum_u2", "sum_s2", "sum_abs_q", "sum_q2")}
        metrics = {
            "lp": 0.5 * mean["sum_q2"],
            "lp_factored": 0.5 * mean["sum_u2"] * mean["sum_s2"],
            "activation_power": mean["sum_u2"],
            "curvature": mean["sum_s2"],
            "taylor": mean["sum_abs_q"],
        }
    # What float32 cannot hold becomes infinite, which no atlas may hold: the writer and the validator say so.
    with np.errstate(over="ignore"):
        return {name: values.astype(np.float32) for name, values in metrics.items()}
