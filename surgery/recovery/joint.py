"""Fit the write projections of several FFNs of a block together by least squares: experts, and shared experts beside them.

Each token reaches some of the units (experts or dense FFNs). The outputs of its units, each times the weight that the router
gave it, should add up to what is wanted. The fit is W = argmin sum_t a_t |y_t - sum_e g_te W_e u_te|^2 + penalty |W - P|^2.

All experts of a layer share the penalty, so an expert's own tokens are the evidence that moves it away from its old weights P:
an expert without tokens keeps them, and an expert with few tokens stays close to them.

The normal equations of all units together are too large to solve at once. Conjugate gradients solve them in a few passes over the
tokens. Each step solves the normal equations of every unit by itself (a block Jacobi preconditioner), so a single step is exact if
each token reaches one unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from surgery.recovery.least_squares import condition_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PENALTY = 3.0
"""Penalty if no held-out data can choose one, in rows: the squared length of this many average rows of inputs."""
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Penalties to choose from."""
STEPS = 16
"""Largest number of steps of the conjugate gradients."""
_CLOSE = 1e-4
"""The steps end when the gradient, in the norm of the preconditioner, is this share of the first."""
_RETRIES = 12


@dataclass(frozen=True, eq=False)
class Rows:
    """What the units of one FFN (its experts, or the FFN itself) read on the tokens of a batch, unit after unit.

    Attributes:
        inputs: Activations of the kept channels, float32 (row, kept).
        token: Number of the token of each row, int64 (row,).
        gain: Factor of the row's output in the block's output, float32 (row,).
        counts: Number of rows of each unit.
    """

    inputs: torch.Tensor
    token: torch.Tensor
    gain: torch.Tensor
    counts: tuple[int, ...]

    def units(self) -> Iterator[tuple[int, slice]]:
        """Number and rows of every unit that has rows."""
        start = 0
        for unit, count in enumerate(self.counts):
            if count:
                yield unit, slice(start, start + count)
            start += count


@dataclass(frozen=True, eq=False)
class Equations:
    """What the units of a block should produce on a batch.

    Attributes:
        rows: One entry for each FFN.
        left: What is still wanted besides the output of the old weights, float32 (token, outputs).
        weights: Weight of each token, float32 (token,).
    """

    rows: tuple[Rows, ...]
    left: torch.Tensor
    weights: torch.Tensor

    def output(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """What ``maps``, (unit, outputs, inputs) of each FFN, add to the block's output, float32 (token, outputs)."""
        total = torch.zeros_like(self.left)
        for rows, of_units in zip(self.rows, maps, strict=True):
            for unit, part in rows.units():
                written = rows.inputs[part] @ of_units[unit].to(rows.inputs).T
                total.index_add_(0, rows.token[part], written * rows.gain[part, None])
        return total


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over the tokens of some batches.

    Attributes:
        inputs: Sum of a g^2 u u^T of each unit of each FFN, float64 (unit, inputs, inputs).
        cross: Sum of a g u y^T, float64 (unit, inputs, outputs), where y is what is left.
        rows: Number of rows of each unit of each FFN, int64 (unit,).
    """

    inputs: list[torch.Tensor]
    cross: list[torch.Tensor]
    rows: list[torch.Tensor]

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            [one + two for one, two in zip(self.inputs, other.inputs, strict=True)],
            [one + two for one, two in zip(self.cross, other.cross, strict=True)],
            [one + two for one, two in zip(self.rows, other.rows, strict=True)],
        )


@dataclass(frozen=True, eq=False)
class JointFit:
    """A fit of several units.

    Attributes:
        changes: Fitted minus old weights of each FFN, float64 (unit, outputs, inputs).
        penalty: The penalty, as in `PENALTIES`.
        condition: Largest estimated condition number (1-norm) of the damped moments of a unit.
        damping: The number that was added to the diagonals, as a share of the mean of the diagonals of all units; 0 if there
            are no rows.
    """

    changes: list[torch.Tensor]
    penalty: float
    condition: float
    damping: float


def sums_of(equations: Callable[[int], Equations], places: Sequence[int], shapes: Sequence[tuple[int, int]]) -> Sums:
    """Sum over the batches ``places``.

    Args:
        equations: Gives a batch by its number.
        shapes: Number of units and of inputs of each FFN.
    """
    first = equations(places[0]).left
    sums = Sums(
        [torch.zeros(units, count, count, dtype=torch.float64, device=first.device) for units, count in shapes],
        [torch.zeros(units, count, first.shape[1], dtype=torch.float64, device=first.device) for units, count in shapes],
        [torch.zeros(units, dtype=torch.int64) for units, _ in shapes],
    )
    for place in places:
        batch = equations(place)
        roots = batch.weights.sqrt()
        for number, rows in enumerate(batch.rows):
            scaled = rows.inputs * (roots[rows.token] * rows.gain)[:, None]
            wanted = batch.left[rows.token] * roots[rows.token, None]
            for unit, part in rows.units():
                sums.inputs[number][unit] += (scaled[part].T @ scaled[part]).double()
                sums.cross[number][unit] += (scaled[part].T @ wanted[part]).double()
            sums.rows[number] += torch.tensor(rows.counts)
    return sums


def error_of(equations: Callable[[int], Equations], places: Sequence[int], changes: Sequence[torch.Tensor]) -> float:
    """sum a |y - change u|^2 over the batches ``places``."""
    return math.fsum(squared_error(equations(place), changes) for place in places)


def squared_error(batch: Equations, changes: Sequence[torch.Tensor]) -> float:
    """sum a |y - change u|^2 over the tokens of ``batch``."""
    return float(((batch.left - batch.output(changes)).square().sum(1) * batch.weights).double().sum())


def fit_jointly(
    equations: Callable[[int], Equations],
    fitted: Sequence[int],
    held_out: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    penalty: float | None = None,
    sums: Sums | None = None,
) -> tuple[JointFit, Sums]:
    """Fit the changes of all units to the batches ``fitted``. Also returns the sums over these batches.

    Args:
        held_out: Batches that choose the penalty.
        shapes: Number of units and of inputs of each FFN.
        penalty: The penalty; None to choose one of `PENALTIES`.
        sums: The sums over ``fitted`` if they are known.
    """
    sums = sums or sums_of(equations, fitted, shapes)
    if penalty is None:
        penalty = _choose(equations, fitted, held_out, sums) if held_out else PENALTY
    damped = _Damped(sums, penalty)
    return JointFit(_solve(equations, fitted, sums, damped), penalty, damped.condition, damped.share), sums


def _choose(equations: Callable[[int], Equations], fitted: Sequence[int], held_out: Sequence[int], sums: Sums) -> float:
    """The penalty that leaves the smallest error on ``held_out`` after one step."""

    def error(penalty: float) -> float:
        damped = _Damped(sums, penalty)
        step = damped.solved(sums.cross)
        length = _length(_inner(step, sums.cross), _inner(step, _applied(equations, fitted, damped, step)))
        return error_of(equations, held_out, [length * part.transpose(1, 2) for part in step])

    return min(PENALTIES, key=error)


class _Damped:
    """The normal equations of each unit by itself, with the penalty.

    Attributes:
        added: The number on the diagonal of each FFN's units.
        condition, share: As `JointFit.condition` and `JointFit.damping`.
    """

    def __init__(self, sums: Sums, penalty: float) -> None:
        traces = [inputs.diagonal(dim1=1, dim2=2).sum(1) for inputs in sums.inputs]
        self.added, self._factors = [], []
        self.condition = 0.0
        for inputs, trace, rows in zip(sums.inputs, traces, sums.rows, strict=True):
            # Without any row the weights stay as they are, whatever the penalty.
            added = penalty * float(trace.sum()) / int(rows.sum()) if float(trace.sum()) > 0 else 1.0
            for _ in range(_RETRIES):
                damped = inputs.clone()
                damped.diagonal(dim1=1, dim2=2).add_(added)
                factors, failed = torch.linalg.cholesky_ex(damped)
                if not bool(failed.any()):
                    break
                added *= 10
            self.added.append(added)
            self._factors.append(factors)
            for unit in range(len(inputs)):
                if int(rows[unit]):
                    self.condition = max(self.condition, condition_of(damped[unit], factors[unit]))
        width = sum(inputs.shape[0] * inputs.shape[1] for inputs in sums.inputs)
        mean = sum(float(trace.sum()) for trace in traces) / width
        self.share = self.added[0] / mean if mean > 0 else 0.0

    def solved(self, right: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The solution for each unit by itself, (unit, inputs, outputs)."""
        return [torch.cholesky_solve(part, factors) for part, factors in zip(right, self._factors, strict=True)]


def _solve(equations: Callable[[int], Equations], places: Sequence[int], sums: Sums, damped: _Damped) -> list[torch.Tensor]:
    """The solution of the normal equations of all units, by conjugate gradients."""
    found = [torch.zeros_like(part) for part in sums.cross]
    gradient = [part.clone() for part in sums.cross]
    alone = damped.solved(gradient)
    now = first = _inner(gradient, alone)
    direction = alone
    for _ in range(STEPS):
        if not now > _CLOSE**2 * first or not math.isfinite(now):
            break
        applied = _applied(equations, places, damped, direction)
        length = _length(now, _inner(direction, applied))
        for part, step, change, left in zip(found, direction, applied, gradient, strict=True):
            part += length * step
            left -= length * change
        alone = damped.solved(gradient)
        before, now = now, _inner(gradient, alone)
        direction = [part + now / before * old for part, old in zip(alone, direction, strict=True)]
    return [part.transpose(1, 2).contiguous() for part in found]


def _applied(
    equations: Callable[[int], Equations], places: Sequence[int], damped: _Damped, step: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The matrix of the normal equations of all units times ``step`` (unit, inputs, outputs)."""
    result = [added * part for added, part in zip(damped.added, step, strict=True)]
    maps = [part.transpose(1, 2) for part in step]
    for place in places:
        batch = equations(place)
        moved = batch.output(maps) * batch.weights[:, None]
        for number, rows in enumerate(batch.rows):
            for unit, part in rows.units():
                scaled = rows.inputs[part] * rows.gain[part, None]
                result[number][unit] += (scaled.T @ moved[rows.token[part]]).double()
    return result


def _length(along: float, curvature: float) -> float:
    return along / curvature if curvature > 0 else 0.0


def _inner(one: Sequence[torch.Tensor], two: Sequence[torch.Tensor]) -> float:
    return math.fsum(float((left * right).sum()) for left, right in zip(one, two, strict=True))
