"""Gradient descent over batches, with an early stop, from a state that can be saved after every step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from surgery.recovery.step_size import step_share

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from surgery.recovery.writes import Leaf

RATE = 0.001
"""Largest step of a weight, as a share of the root mean square of its matrix."""
EVALUATIONS = 8
"""Largest number of times that the held-out sequences are looked at after the start."""
PATIENCE = 4
"""Evaluations in a row without an improvement after which the descent stops. Each of them halves the step size."""
NOT_FINITE = 1e300
"""Stands for a loss that is not finite, because JSON has no such number."""
_CLIP = 1.0
"""Largest norm of the gradient of all weights together."""
_WARMUP = 0.1
"""Share of the steps until the step size is full. From there on it falls along a cosine."""
_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


class Objective(Protocol):
    """What is made small."""

    def differentiate(self, number: int) -> None:
        """Add the gradient of the loss on fitted batch ``number`` to those of the weights."""

    def held_out(self) -> float:
        """The loss on the held-out sequences, of the weights as they would be stored."""


@dataclass(eq=False)
class State:
    """All that a descent needs to go on.

    Attributes:
        weights, first, second, best: Of each trained parameter, float32: its values, the moving averages of its gradient and
            of the square of its gradient, and the values that had the smallest loss on the held-out sequences.
        rates: Largest step of each parameter. It halves where the loss on the held-out sequences did not fall.
        step: Number of steps that were made.
        history: Steps, and the losses on the held-out sequences after them. The first entry is the start.
    """

    weights: list[torch.Tensor]
    first: list[torch.Tensor]
    second: list[torch.Tensor]
    best: list[torch.Tensor]
    rates: list[float]
    step: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best_step(self) -> int:
        """The step that ``best`` is from, the earliest of several."""
        return min(self.history, key=lambda item: (item[1], item[0]))[0]

    @property
    def stopped(self) -> bool:
        """Whether the last evaluations brought no improvement."""
        return sum(step > self.best_step for step, _ in self.history) >= PATIENCE


def first_state(leaves: Sequence[Leaf], loss: float) -> State:
    """The state before the first step. It shares the values of ``leaves``.

    Args:
        loss: The loss on the held-out sequences; 0 if there are none.
    """
    weights = [leaf.parameter.data for leaf in leaves]
    first, second = ([torch.zeros_like(values) for values in weights] for _ in range(2))
    rates = [RATE * _size(leaf) for leaf in leaves]
    history = [(0, loss if math.isfinite(loss) else NOT_FINITE)]
    return State(weights, first, second, [values.clone() for values in weights], rates, history=history)


def descend(
    objective: Objective,
    leaves: Sequence[Leaf],
    state: State,
    batches: int,
    steps: int,
    after: Callable[[State], object] = lambda state: None,
) -> None:
    """Run Adam from ``state`` until ``steps`` steps are made, or the held-out loss no longer falls.

    Where the held-out loss does not fall, the descent goes back to the best weights, and on with half the step size.

    A start whose loss is not finite, or is 0, is left as it is. Two runs on a CPU give the same bits, also if one of them
    continues from a saved state.

    Args:
        leaves: The trained parameters, which hold ``state.weights``.
        batches: Number of fitted batches. Every pass over them has an order of its own.
        after: Called after each step.
    """
    if not 0 < state.history[0][1] < NOT_FINITE:
        return
    every = max(1, math.ceil(steps / EVALUATIONS))
    while state.step < steps and not state.stopped:
        passes, place = divmod(state.step, batches)
        order = torch.randperm(batches, generator=torch.Generator().manual_seed(passes))
        for leaf in leaves:
            leaf.parameter.requires_grad_(True)
        objective.differentiate(int(order[place]))
        gradients = [_taken(leaf) for leaf in leaves]
        share = step_share(state.step, steps, max(1, round(_WARMUP * steps)))
        state.step += 1
        _update(state, gradients, share)
        if state.step % every == 0 or state.step == steps:
            loss = objective.held_out()
            # A NaN is not smaller.
            better = loss < min(value for _, value in state.history)
            state.history.append((state.step, loss if math.isfinite(loss) else NOT_FINITE))
            for best, values in zip(state.best, state.weights, strict=True):
                if better:
                    best.copy_(values)
                else:
                    values.copy_(best)
            if not better:
                state.rates = [rate / 2 for rate in state.rates]
        after(state)


def _update(state: State, gradients: Sequence[torch.Tensor], share: float) -> None:
    """One step of Adam with ``share`` of the largest step size. A gradient that is not finite changes nothing."""
    norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    if not math.isfinite(norm):
        return
    scale = min(1.0, _CLIP / norm) if norm else 1.0
    corrections = [1 - beta**state.step for beta in _BETAS]
    for values, first, second, gradient, rate in zip(
        state.weights, state.first, state.second, gradients, state.rates, strict=True
    ):
        gradient *= scale
        first.lerp_(gradient, 1 - _BETAS[0])
        second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        size = (second / corrections[1]).sqrt_().add_(_EPSILON)
        values.addcdiv_(first, size, value=-share * rate / corrections[0])


def _taken(leaf: Leaf) -> torch.Tensor:
    """The gradient of the elements that may change, which the parameter no longer has afterwards."""
    parameter = leaf.parameter
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    parameter.grad = None
    parameter.requires_grad_(False)
    return gradient if leaf.mask is None else gradient * leaf.mask


def _size(leaf: Leaf) -> float:
    """Root mean square of the elements that may change."""
    values = leaf.parameter.detach()
    if leaf.mask is None:
        return float(values.square().mean().sqrt())
    count = float(leaf.mask.expand_as(values).sum())
    return float(((values * leaf.mask).square().sum() / count).sqrt())
