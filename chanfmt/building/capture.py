"""See the activation u at every write projection in the forward pass, and s = dL/du in the backward pass."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

import torch

from chanfmt.building.column_sums import find_rows, row_hashes
from chanfmt.building.input_sums import squares
from chanfmt.models.find.discover import block_of
from chanfmt.models.find.intercept import Interceptor
from chanfmt.models.run import eager_experts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from chanfmt.building.column_sums import BatchRows, Rows
    from chanfmt.building.input_sums import InputSums
    from chanfmt.building.statistics import ChannelStatistics, FFNStatistics
    from chanfmt.models.ffn import FFN


class Capture:
    """Feeds one `FFNStatistics` per FFN while the model runs in the body of `running`."""

    def __init__(self, model: nn.Module, ffns: list[FFN], statistics: list[FFNStatistics]) -> None:
        self.model = model
        self.statistics = statistics
        self.device = next(model.parameters()).device
        self._ffns = ffns
        self._sequences = 1
        self._split = 0
        self._rows: BatchRows | None = None
        self._reached: dict[int, torch.Tensor] = {}
        self._inputs: dict[int, torch.Tensor] = {}
        self._index: dict[tuple[int, int], torch.Tensor] = {}
        self._squared: tuple[torch.Tensor, int, torch.Tensor] | None = None
        self._interceptor = Interceptor(model)
        for number, (ffn, found) in enumerate(zip(ffns, statistics, strict=True)):
            for place, matrix in enumerate(ffn.other_maps):
                self._interceptor.on(matrix, before=partial(self._other, found.other_maps, place))
            if ffn.members[0].write.matrix.batched:
                self._watch_batched(number, ffn, found)
                continue
            for place, (member, channels) in enumerate(zip(ffn.members, found.members, strict=True)):
                self._interceptor.on(member.reads[0].projection.matrix, before=partial(self._read, (number, place), channels))
                self._interceptor.on(member.write.matrix, before=partial(self._write, (number, place), channels))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """See the products of the model in the body."""
        with contextlib.ExitStack() as stack:
            for number, (ffn, found) in enumerate(zip(self._ffns, self.statistics, strict=True)):
                if found.experts and found.members[0].columns is not None and not ffn.members[0].write.matrix.batched:
                    for name in _modules_around(ffn.container):
                        hook = partial(self._enter, number)
                        stack.callback(self.model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.enter_context(eager_experts(self.model))
            stack.enter_context(self._interceptor)
            yield
        self._squared = None

    def begin(self, sequences: int, split: int, rows: BatchRows | None = None) -> None:
        """Set the number of sequences of the next batch, the split that all of them belong to, and which ones they are.

        Args:
            rows: Needed if columns are accumulated.
        """
        self._sequences = sequences
        self._split = split
        self._rows = rows
        self._inputs.clear()
        self._squared = None

    def _enter(self, number: int, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Remember the tokens that enter a module around the experts of FFN ``number``, if they arrive as (sequence, token, d)."""
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if x is None or not torch.is_grad_enabled() or x.ndim != 3 or len(x) != self._sequences:
            return
        if x.is_floating_point() and x.shape[-1] == self._ffns[number].read_inputs:
            self._inputs[number] = row_hashes(x.detach().reshape(-1, x.shape[-1]))

    def _read(self, key: tuple[int, int], statistics: ChannelStatistics, x: torch.Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        statistics.add_read_power(self._squares(x))
        inputs = self._inputs.get(key[0])
        if inputs is not None:
            self._index[key] = find_rows(row_hashes(x.detach().reshape(-1, x.shape[-1])), inputs)

    def _other(self, sums: InputSums, place: int, x: torch.Tensor) -> None:
        # A matrix may be applied to something else than vectors of its inputs, such as each head by itself.
        if torch.is_grad_enabled() and x.shape[-1] == len(sums.power[place]):
            sums.add(place, self._squares(x), x.numel() // x.shape[-1])

    def _squares(self, x: torch.Tensor) -> torch.Tensor:
        """`squares` of ``x``. Maps that run one after the other often read the same tensor, such as query, key and value."""
        last = self._squared
        if last is None or last[0] is not x or last[1] != x._version:
            last = self._squared = (x, x._version, squares(x.detach()))
        return last[2]

    def _write(self, key: tuple[int, int], statistics: ChannelStatistics, u: torch.Tensor) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        rows = self._rows_of(key, u.numel() // u.shape[-1], u.device) if statistics.columns is not None else None
        u, replaced = _differentiable(u)
        u.register_hook(partial(self._back, statistics, u.detach(), rows))
        return replaced

    def _rows_of(self, key: tuple[int, int], count: int, device: torch.device) -> Rows | None:
        """Where the ``count`` rows of an FFN or an expert come from."""
        ffn = self._ffns[key[0]]
        if self._rows is None:
            return None
        if not ffn.experts:
            return self._rows.of(ffn.place, count)
        index = self._index.pop(key, None)
        if index is None or len(index) != count:
            index = torch.full((count,), -1, dtype=torch.int64, device=device)
        inputs = self._inputs.get(key[0])
        return self._rows.of(ffn.place, 0 if inputs is None else len(inputs), index)

    def _back(self, statistics: ChannelStatistics, u: torch.Tensor, rows: Rows | None, s: torch.Tensor) -> None:
        shape = (1 if statistics.routed else self._sequences, -1, u.shape[-1])
        if u.numel():
            statistics.add(u.reshape(shape), s.detach().reshape(shape), self._split, rows)

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
                channels.add_read_power(squares(rows[reached]))

    def _write_all(self, number: int, statistics: FFNStatistics, u: torch.Tensor) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        u, replaced = _differentiable(u)
        u.register_hook(partial(self._back_all, number, statistics, u.detach(), self._reached.pop(number)))
        return replaced

    def _back_all(self, number: int, statistics: FFNStatistics, u: torch.Tensor, reached: torch.Tensor, s: torch.Tensor) -> None:
        for channels, values, gradient, mine in zip(statistics.members, u, s.detach(), reached, strict=True):
            rows = None
            if channels.columns is not None and self._rows is not None:
                rows = self._rows.of(self._ffns[number].place, len(mine), mine.nonzero()[:, 0])
            channels.add(values[mine][None], gradient[mine][None], self._split, rows)


def _modules_around(container: str) -> list[str]:
    """Names of ``container`` and of the modules around it, without the block of the model."""
    block = block_of(container) or ""
    names = [container]
    while (outer := names[-1].rpartition(".")[0]) and len(outer) > len(block):
        names.append(outer)
    return names


def _differentiable(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``u``, or a leaf in its place if it needs no gradient: before the first FFN nothing does, so the backward pass ends there."""
    if u.requires_grad:
        return u, None
    leaf = u.detach().requires_grad_(True)
    return leaf, leaf
