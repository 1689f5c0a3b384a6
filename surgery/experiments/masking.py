"""Remove channels of a loaded model, or replace write vectors, for the time of a ``with`` block.

The weights of removed channels stay: their activations are replaced before the write projection.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

import torch

from chanfmt.base.errors import UsageError
from chanfmt.format.unit import unit_rows
from chanfmt.models.find.intercept import Interceptor
from chanfmt.models.matrices import bias_of, matrix_of
from chanfmt.models.run import eager_experts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    from torch import nn

    from chanfmt.models.ffn import FFN, Member
    from surgery.experiments.weight import Weight
    from surgery.recovery.refit import FittedFFN


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
def refitted_weights(
    model: nn.Module, ffns: Mapping[int, FFN], weights: Mapping[int, tuple[np.ndarray, FittedFFN]]
) -> Iterator[None]:
    """Give the FFNs of ``model`` other weights in the body. Afterwards it has its own again, bit by bit.

    Args:
        ffns: Block index to the FFN of ``model``.
        weights: Block index to the ids of the kept channels, (kept,), or (expert, kept), and their weights.
    """
    before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def saved(tensor: torch.Tensor) -> torch.Tensor:
        before.append((tensor, tensor.clone()))
        return tensor

    try:
        for index, (kept, fitted) in weights.items():
            ffn = ffns[index]
            for expert, member in enumerate(ffn.members):
                found = fitted.expert(expert) if ffn.experts else fitted
                _replace(model, member, torch.from_numpy(kept[expert] if ffn.experts else kept).long(), found, saved)
        yield
    finally:
        # Gate and up may share a parameter: the first copy of it is the original.
        for tensor, values in reversed(before):
            tensor.copy_(values)


@contextlib.contextmanager
def zeroed_weights(model: nn.Module, ffns: Mapping[int, FFN], weights: Sequence[Weight]) -> Iterator[None]:
    """Set single numbers of write matrices to 0 in the body. Afterwards ``model`` has its own again, bit by bit.

    Raises:
        UsageError: A write matrix does not have that row.
    """
    before = []
    try:
        for weight in weights:
            matrix = matrix_of(model, ffns[weight.block].members[weight.expert].write.matrix)
            if weight.row >= len(matrix):
                raise UsageError(
                    f"the write matrix of layer {ffns[weight.block].layer_index} has no row {weight.row}: it has {len(matrix)}, "
                    "counted from 0"
                )
            place = matrix[(weight.row + weight.step) % len(matrix), weight.channel]
            before.append((place, place.clone()))
            place.zero_()
        yield
    finally:
        for place, value in reversed(before):
            place.copy_(value)


def _replace(
    model: nn.Module, member: Member, kept: torch.Tensor, fitted: FittedFFN, saved: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Give the channels ``kept`` of a dense FFN or of an expert other weights.

    Args:
        saved: Called with every view of a parameter before its values change. Returns the view.
    """
    matrix = saved(matrix_of(model, member.write.matrix))
    ids = kept.to(matrix.device)
    matrix[:, ids] = fitted.weight.to(matrix)
    if member.write.bias is not None and fitted.bias is not None:
        saved(bias_of(model, member.write.bias)).copy_(fitted.bias)
    for read in member.reads:
        if read.role not in fitted.reads:
            continue
        rows = read.start + read.step * ids
        matrix = saved(matrix_of(model, read.projection.matrix))
        matrix[rows] = fitted.reads[read.role].to(matrix)
        if read.projection.bias is not None:
            bias = saved(bias_of(model, read.projection.bias))
            bias[rows] = fitted.reads[f"{read.role}_bias"].to(bias)


def _replaced(gone: torch.Tensor, values: torch.Tensor, activations: torch.Tensor) -> torch.Tensor:
    return torch.where(gone.to(activations.device), values.to(activations), activations)
