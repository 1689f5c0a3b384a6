"""Fit a linear map to wanted outputs by least squares, from second moments, in float64.

The fit solves the normal equations of W = argmin sum_t a_t |y_t - W u_t|^2 + damping |W - P|^2. P is the old map. With this
penalty, the fit is never worse than P on its own data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.linalg import lapack

DAMPING = 1e-1
"""Penalty on the distance from the old map if no held-out data can choose one, as a share of the mean squared input."""
DAMPINGS = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Penalties to choose from."""
_RETRIES = 12
_PART = 8192
"""Rows per product in the dtype of the inputs; the products are summed in float64."""


class Moments:
    """Second moments of inputs u (k,) and targets y (d,), summed over tokens.

    Attributes:
        inputs: Sum of a u u^T, float64 (k, k).
        cross: Sum of a u y^T, float64 (k, d).
        targets: Sum of a |y|^2.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.inputs = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self.targets = 0.0

    def add(self, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> None:
        """Add tokens.

        Args:
            inputs: (tokens, k).
            targets: (tokens, d).
            weights: Weight a of each token, (tokens,).
        """
        for u, y, a in zip(inputs.split(_PART), targets.split(_PART), weights.split(_PART), strict=True):
            root = a.sqrt()[:, None].to(u.dtype)
            scaled, wanted = u * root, y * root
            self.inputs += (scaled.T @ scaled).double()
            self.cross += (scaled.T @ wanted).double()
            self.targets += float(wanted.double().square().sum())

    def copy(self) -> Moments:
        """The same sums, independent of these."""
        new = Moments(0, 0, self.inputs.device)
        new.inputs, new.cross, new.targets = self.inputs.clone(), self.cross.clone(), self.targets
        return new

    def __iadd__(self, other: Moments) -> Moments:
        self.inputs += other.inputs
        self.cross += other.cross
        self.targets += other.targets
        return self

    def error(self, weight: torch.Tensor) -> float:
        """sum a |y - W u|^2 / sum a |y|^2 of the map ``weight`` (d, k); 0 if all targets are 0."""
        if not self.targets:
            return 0.0
        weight = weight.double()
        left = self.targets - 2 * float((weight.T * self.cross).sum()) + float(((weight @ self.inputs) * weight).sum())
        return max(0.0, left) / self.targets


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted map.

    Attributes:
        weight: (d, k), float64.
        damping: The number that was added to the diagonal, relative to its mean.
        condition: Estimated condition number (1-norm) of the damped moments.
        before, after: `Moments.error` of the old map and of the fitted map.
    """

    weight: torch.Tensor
    damping: float
    condition: float
    before: float
    after: float


def fit(moments: Moments, prior: torch.Tensor, damping: float) -> Fit:
    """The map that fits ``moments`` best, drawn towards ``prior``.

    Args:
        prior: The old map, (d, k).
        damping: Penalty on the distance from ``prior``, as a share of the mean squared input. If the moments are not positive
            definite with it, ten times as much is tried.
    """
    prior = prior.double()
    before = moments.error(prior)
    scale = float(moments.inputs.diagonal().mean())
    if not scale > 0 or not moments.targets:
        return Fit(prior, damping, math.inf if not scale > 0 else 1.0, before, before)
    for _ in range(_RETRIES):
        damped = moments.inputs.clone()
        damped.diagonal().add_(damping * scale)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            weight = torch.cholesky_solve(moments.cross + damping * scale * prior.T, factor).T
            after = moments.error(weight)
            # If there is nothing to gain, rounding alone could make the fit worse.
            if math.isfinite(after) and after <= before:
                return Fit(weight, damping, condition_of(damped, factor), before, after)
        damping = max(damping, 1e-12) * 10
    return Fit(prior, damping, math.inf, before, before)


def choose_fit(moments: Moments, held_out: Moments | None, prior: torch.Tensor) -> Fit:
    """The fit of ``moments`` with the penalty, of `DAMPINGS`, that leaves the smallest error on ``held_out``.

    Without held-out data, the penalty is `DAMPING`.
    """
    if held_out is None or not held_out.targets:
        return fit(moments, prior, DAMPING)
    return min((fit(moments, prior, damping) for damping in DAMPINGS), key=lambda found: held_out.error(found.weight))


def condition_of(matrix: torch.Tensor, factor: torch.Tensor) -> float:
    """Estimated condition number (1-norm) of ``matrix``, whose lower Cholesky factor is ``factor``."""
    norm = float(matrix.abs().sum(0).max())
    reciprocal, _ = lapack.dpocon(factor.cpu().numpy(), norm, uplo="L")
    return math.inf if reciprocal == 0 else 1 / float(reciprocal)
