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
PENALTIES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
"""Penalties to choose from, from the strongest to the weakest."""
_FIRST = 10.0
"""The penalty that is tried first, then weaker ones as long as the error falls, or else stronger ones."""
STEPS, CLOSE = 16, 1e-4
"""Largest number of steps of the conjugate gradients. They end earlier if the gradient, in the norm of the preconditioner, is this
share of the first."""
_TRIAL_STEPS, _TRIAL_CLOSE = 8, 1e-2
"""The same to compare penalties."""
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
        sums: Sums over the tokens of the fit.
    """

    changes: list[torch.Tensor]
    penalty: float
    condition: float
    damping: float
    sums: Sums


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
) -> JointFit:
    """Fit the changes of all units to the batches ``fitted``, with the penalty that suits ``held_out`` best.

    Args:
        shapes: Number of units and of inputs of each FFN.
    """
    sums = sums_of(equations, fitted, shapes)
    found = [torch.zeros_like(part) for part in sums.cross]
    problem = _Problem(equations, fitted, sums)
    start = _State(found, sums.cross)
    penalty = PENALTY
    if held_out:
        penalty, start = _choose(problem, held_out, start)
    return problem.fit(penalty, start)


def fit_again(equations: Callable[[int], Equations], places: Sequence[int], found: JointFit, more: Sequence[int]) -> JointFit:
    """The fit to the batches ``places`` with the penalty of ``found``, which was fitted to all of them but ``more``."""
    shapes = [(part.shape[0], part.shape[1]) for part in found.sums.inputs]
    problem = _Problem(equations, places, found.sums + sums_of(equations, more, shapes))
    changes = [part.transpose(1, 2) for part in found.changes]
    moved = problem.moved(changes)
    left = [part - change for part, change in zip(problem.sums.cross, moved, strict=True)]
    return problem.fit(found.penalty, _State(changes, left))


@dataclass(frozen=True, eq=False)
class _State:
    """Changes of the weights, (unit, inputs, outputs), and the cross sums that they leave, of the same shapes."""

    found: list[torch.Tensor]
    left: list[torch.Tensor]


@dataclass(frozen=True, eq=False)
class _Problem:
    """The normal equations of all units on some batches, without a penalty."""

    equations: Callable[[int], Equations]
    places: Sequence[int]
    sums: Sums

    def moved(self, step: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The matrix of the normal equations times ``step`` (unit, inputs, outputs)."""
        result = [torch.zeros_like(part) for part in step]
        maps = [part.transpose(1, 2) for part in step]
        for place in self.places:
            batch = self.equations(place)
            moved = batch.output(maps) * batch.weights[:, None]
            for number, rows in enumerate(batch.rows):
                for unit, part in rows.units():
                    scaled = rows.inputs[part] * rows.gain[part, None]
                    result[number][unit] += (scaled.T @ moved[rows.token[part]]).double()
        return result

    def fit(self, penalty: float, start: _State) -> JointFit:
        """The solution with ``penalty``."""
        damped = _Damped(self.sums, penalty)
        found = self.descend(damped, start, STEPS, CLOSE).found
        changes = [part.transpose(1, 2).contiguous() for part in found]
        return JointFit(changes, penalty, damped.condition(self.sums), damped.share, self.sums)

    def descend(self, damped: _Damped, start: _State, steps: int, close: float) -> _State:
        """Approach the solution from ``start`` by conjugate gradients."""
        found, left = ([part.clone() for part in parts] for parts in (start.found, start.left))
        first = _inner(self.sums.cross, damped.solved(self.sums.cross))
        direction: list[torch.Tensor] = []
        before = 0.0
        for number in range(steps):
            gradient = damped.gradient(found, left)
            alone = damped.solved(gradient)
            now = _inner(gradient, alone)
            if not now > close**2 * first:
                break
            direction = [part + now / before * old for part, old in zip(alone, direction, strict=True)] if number else alone
            moved = self.moved(direction)
            curvature = _inner(direction, moved) + damped.norm(direction)
            if not curvature > 0:
                break
            for part, step, change, rest in zip(found, direction, moved, left, strict=True):
                part += now / curvature * step
                rest -= now / curvature * change
            before = now
        return _State(found, left)


def _choose(problem: _Problem, held_out: Sequence[int], start: _State) -> tuple[float, _State]:
    """The penalty that leaves the smallest error on ``held_out``, and about its solution."""

    def tried(penalty: float, start: _State) -> tuple[float, float, _State]:
        state = problem.descend(_Damped(problem.sums, penalty), start, _TRIAL_STEPS, _TRIAL_CLOSE)
        return error_of(problem.equations, held_out, [part.transpose(1, 2) for part in state.found]), penalty, state

    middle = PENALTIES.index(_FIRST)
    best = tried(_FIRST, start)
    for penalties in (PENALTIES[middle + 1 :], PENALTIES[middle - 1 :: -1]):
        for penalty in penalties:
            # The solution with one penalty is close to that with the next.
            other = tried(penalty, best[2])
            if not other[0] < best[0]:
                break
            best = other
        if best[1] != _FIRST:
            break
    return best[1], best[2]


class _Damped:
    """The normal equations of each unit by itself, with a penalty.

    Attributes:
        share: As `JointFit.damping`.
    """

    def __init__(self, sums: Sums, penalty: float) -> None:
        traces = [inputs.diagonal(dim1=1, dim2=2).sum(1) for inputs in sums.inputs]
        self._added: list[float] = []
        self._factors: list[torch.Tensor] = []
        for inputs, trace, rows in zip(sums.inputs, traces, sums.rows, strict=True):
            # Without any row the weights stay as they are, whatever the penalty.
            added = penalty * float(trace.sum()) / int(rows.sum()) if float(trace.sum()) > 0 else 1.0
            for _ in range(_RETRIES):
                factors, failed = torch.linalg.cholesky_ex(_damp(inputs, added))
                if not bool(failed.any()):
                    break
                added *= 10
            self._added.append(added)
            self._factors.append(factors)
        width = sum(inputs.shape[0] * inputs.shape[1] for inputs in sums.inputs)
        mean = sum(float(trace.sum()) for trace in traces) / width
        self.share = self._added[0] / mean if mean > 0 else 0.0

    def solved(self, right: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The solution for each unit by itself, (unit, inputs, outputs)."""
        return [torch.cholesky_solve(part, factors) for part, factors in zip(right, self._factors, strict=True)]

    def gradient(self, found: Sequence[torch.Tensor], left: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What is left of the cross sums, with the pull of the penalty."""
        return [rest - added * part for rest, added, part in zip(left, self._added, found, strict=True)]

    def norm(self, step: Sequence[torch.Tensor]) -> float:
        """The penalty on ``step``."""
        return math.fsum(added * float(part.square().sum()) for added, part in zip(self._added, step, strict=True))

    def condition(self, sums: Sums) -> float:
        """Largest estimated condition number of a unit that has rows; 0 if none has."""
        return max(
            (
                condition_of(_damp(inputs[unit], added), factors[unit])
                for inputs, added, factors, rows in zip(sums.inputs, self._added, self._factors, sums.rows, strict=True)
                for unit in rows.nonzero().reshape(-1).tolist()
            ),
            default=0.0,
        )


def _damp(inputs: torch.Tensor, added: float) -> torch.Tensor:
    """Square matrices (..., inputs, inputs) with ``added`` on their diagonals."""
    damped = inputs.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(added)
    return damped


def _inner(one: Sequence[torch.Tensor], two: Sequence[torch.Tensor]) -> float:
    return math.fsum(float((left * right).sum()) for left, right in zip(one, two, strict=True))
