"""Hooks that see u at every write projection on the way forward and s = dL/du on the way back."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chanfmt.models.discover import FFN
    from chanfmt.produce.statistics import ChannelStatistics


class Capture:
    """Feeds one `ChannelStatistics` per FFN while the model runs inside `running`."""

    def __init__(self, model: nn.Module, ffns: list[FFN], statistics: list[ChannelStatistics]) -> None:
        self.model = model
        self.ffns = ffns
        self.statistics = statistics
        self._split_of = torch.zeros(0, dtype=torch.int64)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Hooks are in place inside this context and gone after it."""
        handles = []
        for ffn, statistics in zip(self.ffns, self.statistics, strict=True):
            write = self.model.get_submodule(ffn.write)
            handles.append(write.register_forward_pre_hook(partial(self._forward, statistics)))
            read = self.model.get_submodule(ffn.reads[0].module)
            handles.append(read.register_forward_pre_hook(partial(self._read, statistics)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, split_of: torch.Tensor) -> None:
        """Say which splits the sequences of the next batch belong to, int64 (sequence,)."""
        self._split_of = split_of

    def _read(self, statistics: ChannelStatistics, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            statistics.add_read_input(args[0].detach())

    def _forward(self, statistics: ChannelStatistics, module: nn.Module, args: tuple[Any, ...]) -> Any:
        u: torch.Tensor = args[0]
        if not torch.is_grad_enabled():
            return None
        replaced = not u.requires_grad
        if replaced:
            # Nothing before the first FFN needs a gradient: the backward pass ends here.
            u = u.detach().requires_grad_(True)
        u.register_hook(partial(self._backward, statistics, u.detach()))
        return (u, *args[1:]) if replaced else None

    def _backward(self, statistics: ChannelStatistics, u: torch.Tensor, s: torch.Tensor) -> None:
        shape = (len(self._split_of), -1, u.shape[-1])
        statistics.add(u.reshape(shape), s.detach().reshape(shape), self._split_of)
