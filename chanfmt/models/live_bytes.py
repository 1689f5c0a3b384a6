"""Count the bytes of the tensors that are alive, on any device, while code runs."""

from __future__ import annotations

import weakref
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterator


class LiveBytes(TorchDispatchMode):
    """In the body, counts the storages that operations of torch make, forward and backward, until they are freed.

    Each storage counts once, however many tensors share it. Tensors that were there before do not count, nor does memory that
    a kernel takes and gives back within one operation.

    Attributes:
        live: Bytes alive now, by the name of the device.
        peak: The most bytes that were alive at a time, by the name of the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, counts=False)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._note(tensor, counts=True)
        return result

    def _note(self, tensor: torch.Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        device, size = str(tensor.device), storage.nbytes() if counts else 0
        self._known[key] = weakref.ref(storage, partial(self._freed, key, device, size))
        self.live[device] += size
        self.peak[device] = max(self.peak[device], self.live[device])

    def _freed(self, key: int, device: str, size: int, reference: object) -> None:
        self._known.pop(key, None)
        self.live[device] -= size


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors with values of their own in ``value``, however deep."""
    if isinstance(value, torch.Tensor):
        leaves = [value]
    else:
        leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    for leaf in leaves:
        if leaf.layout is torch.strided:
            yield leaf
