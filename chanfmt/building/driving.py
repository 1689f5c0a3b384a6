"""The tokens that drive each channel hardest, kept during a pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

LARGEST_DRIVING_ROW = (1 << 31) - 2
"""Rows are numbered up to this one, so that a row and the sign of u fit into the lower half of a packed value."""
_RUNS_FOR_EACH = 4
"""Runs of rows for each token that is kept: then about as many values pass as are kept."""
_SMALLEST = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
"""The smallest float32 above 0."""


class DrivingTokens:
    """The ``count`` values of each of m channels with the largest |u| so far, and their rows.

    A value is packed into an int64. The bits of |u| as float32 are its upper half. Its lower half is twice
    (`LARGEST_DRIVING_ROW` + 1 less the number of the row, or 0 if the row is not known), plus 1 if u is negative. So the larger of
    two packed values has the larger |u|; of equal ones, it comes from the first row. 0 stands for no value.
    """

    def __init__(self, count: int, n_channels: int, device: torch.device) -> None:
        self._held = torch.zeros(count, n_channels, dtype=torch.int64, device=device)
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, u: torch.Tensor, numbers: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Add the rows ``u`` (row, m). ``numbers`` gives the numbers of rows of ``u``, int64; -1 if they are not known."""
        count, width = self._held.shape
        size = u.abs().float()
        limit = unpacked_drivers(self._held[-1])[0].abs()
        # As many runs of rows have a value that is at least the limit, so no smaller value is among the largest.
        length = max(1, len(u) // (_RUNS_FOR_EACH * count))
        runs = len(u) // length
        if runs >= count and not bool(limit.all()):
            of_runs = size[: runs * length].view(runs, length, width).amax(1)
            limit = torch.maximum(limit, of_runs.T.topk(count).values[:, -1])
        row, channel = (size >= limit.clamp(min=_SMALLEST)).nonzero().unbind(1)
        value, number = u[row, channel], numbers(row)
        low = torch.where(number >= 0, LARGEST_DRIVING_ROW + 1 - number, 0)
        packed = (value.abs().float().view(torch.int32).long() << 32) | (low * 2 + (value < 0))
        self._waiting.append((packed, channel))
        # Few values pass the limit of earlier batches, and sorting takes longest.
        if sum(len(values) for values, _ in self._waiting) > self._held.numel():
            self.packed()

    def packed(self) -> torch.Tensor:
        """All packed values, the largest first, int64 (count, m)."""
        count, width = self._held.shape
        if self._waiting:
            channels = torch.arange(width, device=self._held.device).repeat(count)
            values, order = torch.cat([self._held.reshape(-1), *(item for item, _ in self._waiting)]).sort(descending=True)
            channel, place = torch.cat([channels, *(item for _, item in self._waiting)])[order].sort(stable=True)
            rank = torch.arange(len(values), device=values.device) - torch.searchsorted(channel, channel)
            kept = rank < count
            self._held[rank[kept], channel[kept]] = values[place[kept]]
            self._waiting.clear()
        return self._held

    def take(self, others: torch.Tensor) -> None:
        """Add the packed values of other tokens, int64 (count, m)."""
        held = self.packed()
        held.copy_(torch.cat([held, others.to(held.device)]).sort(0, descending=True).values[: len(held)])


def unpacked_drivers(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values u, float32, and the numbers of their rows, int64, -1 if they are not known, of packed values."""
    low = packed & 0xFFFFFFFF
    size = (packed >> 32).int().view(torch.float32)
    return torch.where(low & 1 == 1, -size, size), torch.where(low > 1, LARGEST_DRIVING_ROW + 1 - (low >> 1), -1)
