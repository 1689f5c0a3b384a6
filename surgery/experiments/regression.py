"""How well channels are predicted from their peers: ridge regressions of all channels at once, from second moments. Pure numpy.

The regressions solve (R + penalty I) b = g, for the correlations R of the peers and g of the peers with the channel. The penalty
is chosen for each channel on tokens that the map was not fitted to, and the result is judged on further tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import cho_factor, cho_solve

if TYPE_CHECKING:
    from collections.abc import Callable

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Penalties to choose from, in units of the variance of a peer."""
_DEAD = 1e-13
"""A variance below this share of the mean square is only the rounding of its terms: the channel does not vary."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over n tokens of u (m,) and of a target y (t,).

    Attributes:
        tokens: n.
        inputs: Sum of u, float64 (m,).
        products: Sum of u u^T, float64 (m, m).
        targets, squares: Sums of y and of y^2, float64 (t,).
        cross: Sum of u y^T, float64 (m, t).
    """

    tokens: int
    inputs: np.ndarray
    products: np.ndarray
    targets: np.ndarray
    squares: np.ndarray
    cross: np.ndarray

    def __add__(self, other: Moments) -> Moments:
        names = ("tokens", "inputs", "products", "targets", "squares", "cross")
        return Moments(*(getattr(self, name) + getattr(other, name) for name in names))


def explained(fit: Moments, choose: Moments, judge: Moments, own: np.ndarray, peers: int | None = None) -> np.ndarray:
    """R^2 on the tokens of ``judge`` of every target from its peers.

    R^2 is 1 - sum (y - y')^2 / sum (y - mean)^2, with the mean over the fitted tokens, so a map that knows nothing has 0, and a
    map that is worse than the mean is below 0.

    Args:
        fit: Tokens that the maps are fitted to while the penalty is chosen.
        choose: Tokens that the penalty of each target is chosen on. Then the maps are fitted to ``fit`` and ``choose``.
        judge: Tokens that the result refers to.
        own: The channel that each target is, or stands for, (t,). It is not among its target's peers.
        peers: Number of channels most correlated with the target, by size, that predict it; None for all others.

    Returns:
        float64 (t,); NaN for a target that does not vary on the fitted tokens or on those of ``judge``.
    """
    scaled = _Scaled(fit, own, peers)
    errors = np.stack([scaled.error(choose, penalty) for penalty in PENALTIES])
    best = np.argmin(np.where(np.isnan(errors), np.inf, errors), axis=0)
    scaled = _Scaled(fit + choose, own, peers)
    found = np.full(len(own), np.nan)
    for place in np.unique(best):
        chosen = best == place
        found[chosen] = 1.0 - scaled.error(judge, PENALTIES[place])[chosen]
    return found


class _Scaled:
    """Moments of the fitted tokens, with mean 0 and variance 1 for every channel and target. Dead channels are 0 throughout."""

    def __init__(self, moments: Moments, own: np.ndarray, peers: int | None) -> None:
        n = moments.tokens
        self.own, self.peers = own, peers
        self.mean, self.target_mean = moments.inputs / n, moments.targets / n
        power, target_power = moments.products.diagonal() / n, moments.squares / n
        self.scale = _inverse_deviation(power, self.mean)
        self.target_scale = _inverse_deviation(target_power, self.target_mean)
        self.products, self.cross, _ = self._of(moments)

    def error(self, moments: Moments, penalty: float) -> np.ndarray:
        """Squared error on the tokens of ``moments``, over the squared distance from the mean, (t,); NaN if the target is dead."""
        weights = self._weights(penalty)
        products, cross, squares = self._of(moments)
        left = squares - 2 * np.einsum("mt,mt->t", weights, cross) + np.einsum("mt,mt->t", weights, products @ weights)
        known = (self.target_scale > 0) & (squares > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(known, np.maximum(left, 0.0) / squares, np.nan)

    def _of(self, moments: Moments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean products of the channels (m, m), of channels and targets (m, t), and squares of targets (t,), about the fitted means."""
        n, mean, target = moments.tokens, self.mean, self.target_mean
        first, targets = moments.inputs, moments.targets
        products = (moments.products - np.outer(first, mean) - np.outer(mean, first)) / n + np.outer(mean, mean)
        cross = (moments.cross - np.outer(first, target) - np.outer(mean, targets)) / n + np.outer(mean, target)
        squares = (moments.squares - 2 * targets * target) / n + target**2
        scaled = products * np.outer(self.scale, self.scale)
        return scaled, cross * np.outer(self.scale, self.target_scale), np.maximum(squares, 0.0) * self.target_scale**2

    def _weights(self, penalty: float) -> np.ndarray:
        """The weights of the peers for each target, (m, t); 0 for the target's own channel."""
        columns = np.arange(len(self.own))
        if self.peers is None:
            solve = _solver(self.products, penalty)
            # Without the own channel, a solution follows from that with all channels and from the column of the inverse.
            unit = np.zeros_like(self.cross)
            unit[self.own, columns] = 1.0
            inverse, weights = solve(unit), solve(self.cross)
            weights -= inverse * (weights[self.own, columns] / inverse[self.own, columns])
            weights[self.own, columns] = 0.0
            return weights
        weights = np.zeros_like(self.cross)
        size = np.abs(self.cross)
        size[self.own, columns] = -1.0
        size[self.scale == 0] = -1.0
        order = np.argsort(-size, axis=0, kind="stable")[: self.peers]
        for column in columns:
            chosen = order[size[order[:, column], column] >= 0, column]
            if len(chosen):
                weights[chosen, column] = _solver(self.products[np.ix_(chosen, chosen)], penalty)(self.cross[chosen, column])
        return weights


def _solver(products: np.ndarray, penalty: float) -> Callable[[np.ndarray], np.ndarray]:
    """Solves (products + penalty I) x = b for b. The matrix is positive definite, however few the tokens were."""
    damped = products.copy()
    damped[np.diag_indices_from(damped)] += penalty
    factor = cho_factor(damped, lower=True, overwrite_a=True, check_finite=False)
    return lambda right: np.asarray(cho_solve(factor, right, check_finite=False))


def _inverse_deviation(power: np.ndarray, mean: np.ndarray) -> np.ndarray:
    variance = power - mean**2
    alive = variance > _DEAD * power
    return np.where(alive, 1.0 / np.sqrt(np.where(alive, variance, 1.0)), 0.0)
