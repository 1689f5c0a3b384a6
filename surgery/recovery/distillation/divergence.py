"""The Kullback-Leibler divergence of the cut model's next-token distribution from the dense model's, in chunks of positions.

The logits of a whole batch would need more memory than the model. They are computed for a few positions at a time, and only
the gradient of the hidden states stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK_BYTES = 64 << 20
"""Size of the float32 logits of a chunk."""


def divergence(logits: Callable[[torch.Tensor], torch.Tensor], dense: torch.Tensor, cut: torch.Tensor, vocabulary: int) -> float:
    """KL(dense || cut) in nats, summed over all positions.

    Args:
        logits: Computes logits (1, position, vocabulary) from last hidden states (1, position, feature).
        dense, cut: Last hidden states of the two models, (sequence, position, feature).
        vocabulary: Number of logits of a position.
    """
    with torch.no_grad():
        parts = [float(_sum(logits, one, other)) for one, other in _chunks(dense, cut, vocabulary)]
    return sum(parts)


def differentiate(
    logits: Callable[[torch.Tensor], torch.Tensor],
    dense: torch.Tensor,
    cut: torch.Tensor,
    vocabulary: int,
    positions: int | None = None,
) -> float:
    """Run the backward pass of the mean of KL(dense || cut) over all positions, through ``cut`` to the weights behind it.

    Args:
        positions: Positions that the mean is over; None for those of ``cut``. If ``cut`` holds a part of them, the gradients of
            all parts add up to that of the mean.

    Returns:
        The mean, in nats.
    """
    count = positions or cut.shape[0] * cut.shape[1]
    whole, gradients = 0.0, []
    for one, other in _chunks(dense, cut.detach(), vocabulary):
        states = other.requires_grad_(True)
        with torch.enable_grad():
            mean = _sum(logits, one, states) / count
        gradients.append(torch.autograd.grad(mean, states)[0])
        whole += float(mean.detach())
    cut.backward(torch.cat(gradients, 1).reshape(cut.shape))
    return whole


def _chunks(dense: torch.Tensor, cut: torch.Tensor, vocabulary: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states of the same positions, (1, position, feature) each."""
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    flat = [states.reshape(1, -1, states.shape[-1]).split(size, 1) for states in (dense, cut)]
    return list(zip(*flat, strict=True))


def _sum(logits: Callable[[torch.Tensor], torch.Tensor], dense: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        wanted = logits(dense).float().log_softmax(-1)
    found = logits(cut).float().log_softmax(-1)
    return torch.nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)
