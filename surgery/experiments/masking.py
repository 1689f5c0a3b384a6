"""Remove channels of a loaded model, or replace write vectors, for the time of a ``with`` block.

The weights of removed channels stay: their activations are replaced before the write projection.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

import torch

from chanfmt.format.unit import unit_rows
from chanfmt.models.find.intercept import Interceptor
from chanfmt.models.matrices import matrix_of
from chanfmt.models.run import eager_experts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    from torch import nn

    from chanfmt.models.ffn import FFN
    from surgery.recovery.refit import FittedWrite


@contextlib.contextmanager
def masked(
    model: nn.Module, ffns: Mapping[int, FFN], removed: Mapping[int, np.ndarray], means: Mapping[int, np.ndarray] | None = None
) -> Iterator[None]:
    """Make ``model`` compute as if channels were removed, in the body. Its parameters are only read.

    Args:
        ffns: Block index to the FFN of ``model``.
        removed: Block index to a mask of the channels to remove, bool (channel,), or (expert, channel). Blocks may be
            left out.
        means: Block index to the values that replace the activations, of the shape of the masks; None for 0.
    """
    interceptor = Interceptor(model)
    for index, mask in removed.items():
        if not mask.any():
            continue
        gone = torch.from_numpy(unit_rows(mask))
        values = torch.zeros(gone.shape) if means is None else torch.from_numpy(unit_rows(means[index]))
        members = ffns[index].members
        if members[0].write.matrix.batched:
            # One product computes all experts. Their rows lie along the first axis.
            interceptor.on(members[0].write.matrix, before=partial(_replaced, gone[:, None], values[:, None]))
            continue
        for expert, member in enumerate(members):
            interceptor.on(member.write.matrix, before=partial(_replaced, gone[expert], values[expert]))
    # The interceptor does not see fused kernels of experts.
    with eager_experts(model), interceptor:
        yield


@contextlib.contextmanager
def refitted_writes(
    model: nn.Module, ffns: Mapping[int, FFN], weights: Mapping[int, tuple[np.ndarray, FittedWrite]]
) -> Iterator[None]:
    """Give ``model`` other write vectors in the body. Afterwards it has its own again, bit by bit.

    Args:
        ffns: Block index to the FFN of ``model``.
        weights: Block index of a dense FFN to the ids of its kept channels (kept,), and their write vectors.
    """
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for index, (kept, fitted) in weights.items():
            write = ffns[index].members[0].write
            matrix = matrix_of(model, write.matrix)
            before.append((matrix, matrix.clone()))
            matrix[:, torch.from_numpy(kept).long().to(matrix.device)] = fitted.weight.to(matrix)
            if write.bias is not None and fitted.bias is not None:
                bias = model.get_parameter(write.bias.parameter).detach()
                before.append((bias, bias.clone()))
                bias.copy_(fitted.bias)
        yield
    finally:
        for tensor, values in before:
            tensor.copy_(values)


def _replaced(gone: torch.Tensor, values: torch.Tensor, activations: torch.Tensor) -> torch.Tensor:
    return torch.where(gone.to(activations.device), values.to(activations), activations)
