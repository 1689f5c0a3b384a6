"""See the activation u at every write projection in the forward pass, and s = dL/du in the backward pass."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

import torch

from chanfmt.models.find.intercept import Interceptor
from chanfmt.models.run import eager_experts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from chanfmt.building.statistics import ChannelStatistics, FFNStatistics
    from chanfmt.models.ffn import FFN


class Capture:
    """Feeds one `FFNStatistics` per FFN while the model runs in the body of `running`."""

    def __init__(self, model: nn.Module, ffns: list[FFN], statistics: list[FFNStatistics]) -> None:
        self.model = model
        self.statistics = statistics
        self._sequences = 1
        self._split = 0
        self._reached: dict[int, torch.Tensor] = {}
        self._interceptor = Interceptor(model)
        for number, (ffn, found) in enumerate(zip(ffns, statistics, strict=True)):
            if ffn.members[0].write.matrix.batched:
                self._watch_batched(number, ffn, found)
                continue
            for member, channels in zip(ffn.members, found.members, strict=True):
                self._interceptor.on(member.reads[0].projection.matrix, before=partial(self._read, channels))
                self._interceptor.on(member.write.matrix, before=partial(self._write, channels))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """See the products of the model in the body."""
        with eager_experts(self.model), self._interceptor:
            yield

    def begin(self, sequences: int, split: int) -> None:
        """Set the number of sequences of the next batch, and the split that all of them belong to."""
        self._sequences = sequences
        self._split = split

    def _read(self, statistics: ChannelStatistics, x: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            statistics.add_read_input(x.detach())

    def _write(self, statistics: ChannelStatistics, u: torch.Tensor) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        u, replaced = _differentiable(u)
        u.register_hook(partial(self._back, statistics, u.detach()))
        return replaced

    def _back(self, statistics: ChannelStatistics, u: torch.Tensor, s: torch.Tensor) -> None:
        shape = (1 if statistics.routed else self._sequences, -1, u.shape[-1])
        if u.numel():
            statistics.add(u.reshape(shape), s.detach().reshape(shape), self._split)

    def _watch_batched(self, number: int, ffn: FFN, statistics: FFNStatistics) -> None:
        member = ffn.members[0]
        self._interceptor.on(member.reads[0].projection.matrix, before=partial(self._read_all, number, statistics))
        self._interceptor.on(member.write.matrix, before=partial(self._write_all, number, statistics))

    def _read_all(self, number: int, statistics: FFNStatistics, x: torch.Tensor) -> None:
        """Add the read inputs of all experts. Each expert gets all tokens; those that were not routed to it are zeros, and skipped."""
        if torch.is_grad_enabled():
            x = x.detach()
            self._reached[number] = (x != 0).any(-1)
            for channels, rows, reached in zip(statistics.members, x, self._reached[number], strict=True):
                channels.add_read_input(rows[reached])

    def _write_all(self, number: int, statistics: FFNStatistics, u: torch.Tensor) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        u, replaced = _differentiable(u)
        u.register_hook(partial(self._back_all, statistics, u.detach(), self._reached.pop(number)))
        return replaced

    def _back_all(self, statistics: FFNStatistics, u: torch.Tensor, reached: torch.Tensor, s: torch.Tensor) -> None:
        for channels, rows, gradient, mine in zip(statistics.members, u, s.detach(), reached, strict=True):
            channels.add(rows[mine][None], gradient[mine][None], self._split)


def _differentiable(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``u``, or a leaf in its place if it needs no gradient: before the first FFN nothing does, so the backward pass ends there."""
    if u.requires_grad:
        return u, None
    leaf = u.detach().requires_grad_(True)
    return leaf, leaf
