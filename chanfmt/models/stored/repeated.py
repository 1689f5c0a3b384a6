"""Tensors that repeat themselves along axes, kept as the few elements that they have in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Sequence


class Unwritten(TorchFunctionMode):
    """In its body, joining and reshaping of tensors leaves axes that repeat (stride 0) as they are.

    Values and shapes are those that torch gives. Memory layouts may differ: a tensor that torch would make contiguous may
    not be, and a view may be a copy.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _INSTEAD.get(func, func)(*args, **(kwargs or {}))


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    first = tensors[0]
    dim %= first.ndim
    repeated = [axis for axis in range(first.ndim) if axis != dim and all(tensor.stride(axis) == 0 for tensor in tensors)]
    shape = list(first.shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    parts = [_once(tensor, repeated) for tensor in tensors]
    if all(part.stride(dim) == 0 or part.shape[dim] == 1 for part in parts):
        rows = [part.narrow(dim, 0, 1) for part in parts]
        if all(torch.equal(row, rows[0]) for row in rows):
            return rows[0].expand(shape)
    return torch.cat(parts, dim).expand(shape)


def _stack(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return _cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


def _reshape(tensor: torch.Tensor, *sizes: Any) -> torch.Tensor:
    if isinstance(sizes[0], torch.dtype):
        return tensor.view(*sizes)
    shape = torch.empty(tensor.shape, device="meta").reshape(*sizes).shape
    kept = min(tensor.ndim, len(shape))
    head = next((axis for axis in range(kept) if tensor.shape[axis] != shape[axis]), kept)
    tail = next((axis for axis in range(kept - head) if tensor.shape[-1 - axis] != shape[-1 - axis]), kept - head)
    # The axes before and behind the axes that change, as counted in the tensor and in the result.
    outer = [*((axis, axis) for axis in range(head)), *((tensor.ndim - axis, len(shape) - axis) for axis in range(1, tail + 1))]
    repeated = {before: after for before, after in outer if tensor.stride(before) == 0}
    core = list(shape)
    for axis in repeated.values():
        core[axis] = min(1, core[axis])
    return _once(tensor, repeated).reshape(core).expand(shape)


def _once(tensor: torch.Tensor, repeated: Any) -> torch.Tensor:
    """``tensor`` with one element along the axes ``repeated``."""
    for axis in repeated:
        tensor = tensor.narrow(axis, 0, min(1, tensor.shape[axis]))
    return tensor


_INSTEAD: dict[Any, Any] = {
    torch.Tensor.contiguous: _contiguous,
    torch.cat: _cat,
    torch.stack: _stack,
    torch.reshape: _reshape,
    torch.Tensor.reshape: _reshape,
    torch.Tensor.view: _reshape,
}
