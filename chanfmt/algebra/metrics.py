"""Metrics that follow from an atlas's sums (spec section "Metrics"). Pure numpy.

To add a metric, add its row to `chanfmt.format.schema.METRICS` with the merge rule ``derive``, and its formula to `FORMULAS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from chanfmt.format.reader import Stack


@dataclass(frozen=True)
class Formula:
    """How a metric follows from token means.

    Attributes:
        sums: Names of the sums whose means it takes.
        of: The means, float64 in that order, to the metric.
    """

    sums: tuple[str, ...]
    of: Callable[..., np.ndarray]


FORMULAS: dict[str, Formula] = {
    "lp": Formula(("sum_q2",), lambda q2: 0.5 * q2),
    "lp_factored": Formula(("sum_u2", "sum_s2"), lambda u2, s2: 0.5 * u2 * s2),
    "activation_power": Formula(("sum_u2",), lambda u2: u2),
    "curvature": Formula(("sum_s2",), lambda s2: s2),
    "taylor": Formula(("sum_abs_q",), lambda abs_q: abs_q),
}
"""Metric to formula, in the order of `chanfmt.format.schema.METRICS`; ``lp`` is equation 4 of arXiv 2604.23475."""


def derive_metrics(sums: Mapping[str, np.ndarray], tokens: np.ndarray | np.int64) -> dict[str, np.ndarray]:
    """Metrics of an atlas's sums, those of `FORMULAS` whose sums are given.

    Args:
        sums: Variable to sums over tokens, float64 (layer[, expert], channel); other variables are passed over.
        tokens: Tokens behind each row, int64 (layer[, expert]).

    Returns:
        Metric to values, float32 of the sums' shape; NaN in rows that no token reached.
    """
    count = np.asarray(tokens, dtype=np.float64)[..., None]
    mean: dict[str, np.ndarray] = {}
    metrics = {}
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for name, formula in FORMULAS.items():
            if not all(term in sums for term in formula.sums):
                continue
            for term in formula.sums:
                if term not in mean:
                    mean[term] = np.where(count > 0, sums[term] / count, np.nan)
            # A value that float32 cannot hold becomes infinite. No atlas may hold that: the writer and the validator refuse it.
            metrics[name] = formula.of(*(mean[term] for term in formula.sums)).astype(np.float32)
    return metrics


def holds_gradients(stacks: Iterable[Stack]) -> bool:
    """Whether an atlas with ``stacks`` holds a metric that needs a gradient of a loss."""
    needing = [name for name in FORMULAS if name != "activation_power"]
    return any(name in stack for stack in stacks for name in needing)
