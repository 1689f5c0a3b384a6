"""See and replace the inputs and outputs of chosen matrix products of a model."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from chanfmt.models.ffn import Matrix

    Before = Callable[[torch.Tensor], torch.Tensor | None]
    After = Callable[[torch.Tensor], torch.Tensor | None]

_PRODUCTS: dict[Any, tuple[int, int]] = {
    functional.linear: (0, 1),
    torch.matmul: (0, 1),
    torch.Tensor.matmul: (0, 1),
    torch.Tensor.__matmul__: (0, 1),
    torch.mm: (0, 1),
    torch.Tensor.mm: (0, 1),
    torch.bmm: (0, 1),
    torch.Tensor.bmm: (0, 1),
    torch.addmm: (1, 2),
    torch.baddbmm: (1, 2),
}
"""Functions that multiply by a weight, with the positions of input and weight among their arguments."""
_NAMES = {0: ("input", "self", "tensor1"), 1: ("weight", "other", "mat2", "tensor2", "mat1", "batch1"), 2: ("mat2", "batch2")}


class Interceptor(TorchFunctionMode):
    """In its body, products with the matrices given to `on` pass through the functions given with them.

    Calls are seen above autograd, so the tensors that a function returns take part in the backward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._before: dict[tuple[int, int, bool], list[Before]] = defaultdict(list)
        self._after: dict[tuple[int, int, bool], list[After]] = defaultdict(list)
        self._storages: set[int] = set()

    def on(self, matrix: Matrix, *, before: Before | None = None, after: After | None = None) -> None:
        """Call ``before`` with the input of products with ``matrix``, and ``after`` with their output.

        A tensor that they return replaces the input or the output. For a batched matrix, the inputs and outputs of all
        experts arrive at once.
        """
        parameter = self._model.get_parameter(matrix.parameter)
        offset = int(parameter.storage_offset())
        if not matrix.batched:
            offset += parameter.stride(0) * (matrix.index if matrix.index is not None else matrix.row)
        storage = parameter.untyped_storage().data_ptr()
        self._storages.add(storage)
        key = (storage, offset, matrix.batched)
        if before is not None:
            self._before[key].append(before)
        if after is not None:
            self._after[key].append(after)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        positions = _PRODUCTS.get(func)
        if positions is None:
            return func(*args, **kwargs)
        weight = _argument(positions[1], args, kwargs)
        if not isinstance(weight, torch.Tensor) or weight.untyped_storage().data_ptr() not in self._storages:
            return func(*args, **kwargs)
        key = (weight.untyped_storage().data_ptr(), int(weight.storage_offset()), weight.ndim == 3)
        with torch._C.DisableTorchFunction():
            for before in self._before.get(key, ()):
                changed = before(_argument(positions[0], args, kwargs))
                if changed is not None:
                    args, kwargs = _replaced(positions[0], args, kwargs, changed)
            result = func(*args, **kwargs)
            for after in self._after.get(key, ()):
                changed = after(result)
                if changed is not None:
                    result = changed
        return result


def _argument(position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if position < len(args):
        return args[position]
    return next((kwargs[name] for name in _NAMES[position] if name in kwargs), None)


def _replaced(
    position: int, args: tuple[Any, ...], kwargs: dict[str, Any], value: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    name = next(name for name in _NAMES[position] if name in kwargs)
    return args, kwargs | {name: value}
