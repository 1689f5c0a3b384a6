"""The memory that training a cut model needs: an estimate before the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.errors import ChanfmtError
from chanfmt.models.device_memory import free_memory
from surgery.recovery.distillation.divergence import CHUNK_BYTES

if TYPE_CHECKING:
    import torch

    from chanfmt.models.safetensors import CheckpointIndex
    from surgery.planning.plan import PruningPlan

_COPIES = 4
"""Float32 copies of the trained weights besides those of the model: the gradient, two moving averages, and the best."""
_HIDDEN, _WIDTH, _CHUNKS = 14, 5, 6
"""Vectors of the size of the hidden state and of the kept width that a block keeps of each token for its backward pass, and
copies of the logits of a chunk. These are rough counts for a Llama."""


@dataclass(frozen=True)
class Needs:
    """An estimate of the bytes that a training needs.

    Attributes:
        least: Bytes if only one block at a time keeps its activations for the backward pass.
        activations: Further bytes if all blocks keep them.
    """

    least: int
    activations: int


def estimate(plan: PruningPlan, index: CheckpointIndex, dtype: torch.dtype, tokens: int) -> Needs:
    """What the training of the cut FFNs of ``plan`` needs.

    Args:
        dtype: Dtype of the frozen weights.
        tokens: Tokens of a step.
    """
    trained, widest, hidden = 0.0, 0, 0
    for block in plan.blocks:
        shapes = {item.tensor: index.tensors[item.tensor].shape for item in block.tensors if item.axis is not None}
        if block.is_cut:
            trained += sum(float(np.prod(shape)) for shape in shapes.values()) * block.n_kept / block.n_channels
        widest = max(widest, block.n_kept)
        hidden = max([hidden, *(min(shape) for shape in shapes.values() if len(shape) > 1)])
    block_bytes = tokens * dtype.itemsize * (_HIDDEN * hidden + _WIDTH * widest)
    # Weights that are trained are in float32, whatever the others are in.
    copies = (_COPIES * 4 + (0 if dtype.itemsize == 4 else 4)) * trained
    states = tokens * dtype.itemsize * hidden * len(plan.blocks)
    least = index.parameters * dtype.itemsize + copies + block_bytes + states + _CHUNKS * CHUNK_BYTES
    return Needs(int(least), block_bytes * len(plan.blocks))


def saves_activations(needs: Needs, device: torch.device) -> bool:
    """Whether the memory of ``device`` suffices only if each block is computed again in the backward pass.

    Raises:
        ChanfmtError: It does not suffice at all.
    """
    available = free_memory(device)
    # A device that does not say what is free may have enough.
    if available is None:
        return False
    if needs.least > available:
        raise ChanfmtError(
            f"--recover distill needs about {needs.least / 1e9:.1f} GB of memory for the model and its training, and "
            f"{available / 1e9:.1f} GB are available",
            hint="use --recover block, which has one block in memory at a time",
        )
    return needs.least + needs.activations > available
