"""Adapt a whole FFN, reads and write, by gradient descent until the cut block gives the dense block's output.

The work on one block starts from its least-squares solution and ends with the weights that have the smallest error on the
held-out sequences, the least-squares solution among them. "A Free Lunch in LLM Compression" (arXiv 2510.14444) finds that a
window with a nonlinearity recovers more than a single matrix.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch

from surgery.recovery.folds import fold_places
from surgery.recovery.precision import half_products
from surgery.recovery.step_size import step_share

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from surgery.recovery.folds import Batch
    from surgery.recovery.writes import Leaf

EPOCHS = 4
"""Passes over the fitted tokens."""
RATE = 0.02
"""Largest step of a weight, as a share of the root mean square of its matrix."""
_WARMUP = 10
"""Steps until the step size is full. From there on it falls along a cosine."""


class Changeable(Protocol):
    """Write projections that an adaptation changes."""

    def copy(self: W) -> W:
        """The same weights, independent of these."""

    def leaves(self) -> list[Leaf]:
        """The weights, which are changed in place."""


W = TypeVar("W", bound=Changeable)
W_contra = TypeVar("W_contra", bound=Changeable, contravariant=True)


class Target(Protocol[W_contra]):
    """What a cut FFN should compute on the tokens of a batch."""

    def output(self, place: int, write: W_contra) -> torch.Tensor:
        """The output on batch number ``place`` with the present reads and ``write``, float32 (token, feature)."""

    def wanted(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The output of the dense model, float32 (token, feature), and the weight of each token, (token,)."""

    def scale(self, place: int) -> float:
        """Weighted sum over the tokens of the squared output that the FFN has to produce."""


@dataclass(frozen=True, eq=False)
class Adapted(Generic[W]):
    """What an adaptation ended with.

    Attributes:
        write: The write projection; the reads are changed in place.
        errors: Source and fold to the squared error, as a share of the squared output that the FFN has to produce.
        held_out_before: Error on all held-out tokens at the start; None if nothing is held out.
        epoch: Epoch that the weights are from; 0 for those of the start.
    """

    write: W
    errors: dict[tuple[int, bool], float]
    held_out_before: float | None
    epoch: int


def adapt(
    target: Target[W],
    batches: Sequence[Batch],
    reads: Sequence[Leaf],
    write: W,
    seed: int,
    progress: Callable[[int], object],
    dtype: torch.dtype = torch.float32,
) -> Adapted[W]:
    """Adapt ``reads``, in place, and ``write``.

    Args:
        seed: Seed of the order of the batches.
        progress: Called with the number of sequences after each batch of an epoch.
        dtype: Dtype of the products of the descent. The errors are computed as outside of this function.
    """
    now = write.copy()
    leaves = [*reads, *now.leaves()]
    fitted, held = fold_places(batches)
    before = evaluate(target, batches, held, now)
    best, epoch = total(before, target, batches, held), 0
    held_out_before = best if held else None
    kept = [leaf.parameter.detach().clone() for leaf in leaves]
    if held and math.isfinite(best) and best > 0:
        for number in _descend(target, batches, fitted, leaves, now, seed, progress, dtype):
            error = total(evaluate(target, batches, held, now), target, batches, held)
            # A NaN is not smaller.
            if error < best:
                best, epoch = error, number
                kept = [leaf.parameter.detach().clone() for leaf in leaves]
    with torch.no_grad():
        for leaf, values in zip(leaves, kept, strict=True):
            leaf.parameter.copy_(values)
    return Adapted(now, evaluate(target, batches, range(len(batches)), now), held_out_before, epoch)


def evaluate(target: Target[W], batches: Sequence[Batch], places: Iterable[int], write: W) -> dict[tuple[int, bool], float]:
    """Source and fold to the error of the present weights on the batches ``places``; 0 if nothing has to be produced."""
    error: dict[tuple[int, bool], float] = defaultdict(float)
    scale: dict[tuple[int, bool], float] = defaultdict(float)
    with torch.no_grad():
        for place in places:
            error[batches[place].group] += float(_squared(target, place, write).double().sum())
            scale[batches[place].group] += target.scale(place)
    return {group: error[group] / scale[group] if scale[group] else 0.0 for group in error}


def total(
    errors: Mapping[tuple[int, bool], float], target: Target[Any], batches: Sequence[Batch], places: Sequence[int]
) -> float:
    """The error on the batches ``places`` together, from the ``errors`` of their groups; 0 if nothing has to be produced."""
    scale = math.fsum(target.scale(place) for place in places)
    return math.fsum(errors[batches[place].group] * target.scale(place) for place in places) / scale if scale else 0.0


def _squared(target: Target[W], place: int, write: W) -> torch.Tensor:
    """Weighted squared error of each token, (token,)."""
    wanted, weights = target.wanted(place)
    return (target.output(place, write) - wanted).square().sum(1) * weights


def _descend(
    target: Target[W],
    batches: Sequence[Batch],
    fitted: Sequence[int],
    leaves: Sequence[Leaf],
    write: W,
    seed: int,
    progress: Callable[[int], object],
    dtype: torch.dtype,
) -> Iterable[int]:
    """Run Adam over the fitted batches, and yield the number of each epoch when it ends."""
    rates = [RATE * float(leaf.parameter.detach().square().mean().sqrt()) for leaf in leaves]
    moving = [(leaf, rate) for leaf, rate in zip(leaves, rates, strict=True) if rate > 0]
    if not moving:
        return
    optimizer = torch.optim.Adam([{"params": [leaf.parameter], "lr": rate} for leaf, rate in moving], fused=True)
    device = moving[0][0].parameter.device
    generator = torch.Generator().manual_seed(seed)
    mean = math.fsum(target.scale(place) for place in fitted) / len(fitted)
    steps, step = EPOCHS * len(fitted), 0
    for epoch in range(1, EPOCHS + 1):
        for index in torch.randperm(len(fitted), generator=generator).tolist():
            share = step_share(step, steps, _WARMUP)
            for group, (_, rate) in zip(optimizer.param_groups, moving, strict=True):
                group["lr"] = share * rate
            with torch.enable_grad():
                for leaf in leaves:
                    leaf.parameter.requires_grad_(True)
                with half_products(device, dtype):
                    loss = _squared(target, fitted[index], write).sum() / mean
                loss.backward()
            for leaf in leaves:
                if leaf.mask is not None and leaf.parameter.grad is not None:
                    leaf.parameter.grad *= leaf.mask
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for leaf in leaves:
                leaf.parameter.requires_grad_(False)
            step += 1
            progress(len(batches[fitted[index]].ids))
        yield epoch
