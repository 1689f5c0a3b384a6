"""What the well-known columns of a build rest on, accumulated in its pass: peaks, driving tokens, sums by position, activity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from chanfmt.building.driving import DrivingTokens
from chanfmt.format.columns import ACTIVITY, DRIVERS, PEAKS, POSITIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

LARGEST_ROW = (1 << 32) - 2
"""Rows are numbered up to this one, so that a row fits into the lower half of a peak."""
_RUN = 32
"""Rows of which the largest |u| is found at a time."""
_MOMENTS = 2
"""Rows of a pair of sums: u^2 and q^2."""


@dataclass(frozen=True)
class Wanted:
    """Which columns a pass accumulates for.

    Attributes:
        groups: Members of `chanfmt.format.columns.MEASURED_GROUPS`.
        sources: Number of calibration sources.
        drivers: Number of driving tokens that are kept of each channel, if they are among ``groups``.
    """

    groups: tuple[str, ...] = ()
    sources: int = 1
    drivers: int = 0


@dataclass(frozen=True)
class Delimiters:
    """The delimiters among the tokens of a batch.

    Attributes:
        length: Tokens of a sequence.
        mask: Whether each token is one, bool (sequence * position,).
        chosen: Indices of those that are, int64.
    """

    length: int
    mask: torch.Tensor
    chosen: torch.Tensor


@dataclass(frozen=True)
class BatchRows:
    """Which sequences a batch consists of.

    Attributes:
        first: Number of the batch's first sequence in canonical order.
        stride: Numbers that one sequence takes among the numbers of rows: at least the rows of a sequence in any FFN.
        source_of: Source of each sequence, int64 (sequence,).
        delimiters: Place of an FFN to the delimiters among the tokens that the FFNs there read.
    """

    first: int
    stride: int
    source_of: torch.Tensor
    delimiters: Mapping[str, Delimiters]

    def of(self, place: str, rows: int, index: torch.Tensor | None = None) -> Rows:
        """The rows that an FFN of ``place`` or an expert sees.

        Args:
            rows: Rows that all sequences of the batch have together in the FFN.
            index: For an expert, the row of the FFN's input that each of its rows comes from, -1 if that is not known,
                int64 (row,); None if the FFN sees all rows in order.
        """
        length, rest = divmod(rows, len(self.source_of))
        delimiters = self.delimiters.get(place)
        if rest or length > self.stride:
            return Rows(self, 0, index, None)
        return Rows(self, length, index, delimiters if delimiters is not None and delimiters.length == length else None)


@dataclass(frozen=True)
class Rows:
    """Where the rows of an FFN's or an expert's activation come from.

    Attributes:
        batch: The batch.
        length: Rows of one sequence in the FFN; 0 if the rows do not divide among the sequences.
        index: See `BatchRows.of`.
        delimiters: The delimiters among the rows of the FFN; None if they are not known.
    """

    batch: BatchRows
    length: int
    index: torch.Tensor | None
    delimiters: Delimiters | None

    @property
    def in_order(self) -> bool:
        """Whether the FFN sees all rows of all sequences in order."""
        return self.index is None and self.length > 0

    def numbers(self, row: torch.Tensor) -> torch.Tensor:
        """Numbers of the rows ``row`` of the activation among all rows of the calibration, int64; -1 if they are not known."""
        if self.length == 0:
            return torch.full_like(row, -1)
        origin = row if self.index is None else self.index[row]
        number = (self.batch.first + origin // self.length) * self.batch.stride + origin % self.length
        return torch.where(origin >= 0, number, -1)

    def origin(self, count: int, device: torch.device) -> torch.Tensor:
        """Row of the FFN's input that each of ``count`` rows comes from, int64; -1 if it is not known."""
        if self.length == 0:
            return torch.full((count,), -1, dtype=torch.int64, device=device)
        return torch.arange(count, device=device) if self.index is None else self.index


class ColumnSums:
    """Accumulates what the columns of ``wanted`` need, for the m channels of one dense FFN or one expert.

    Attributes:
        peak: int64 (m,): the bits of the largest |u| as float32 in the upper half, and in the lower half `LARGEST_ROW` + 1
            less the number of its row, or 0 if the row is not known. The larger of two peaks is the larger |u|; of equal
            ones, the first row.
        drivers: The driving tokens; None if they are not wanted.
        first, delimiter: Sums of u^2 and of q^2 over first positions and over delimiters, float64 (2, m).
        active: Number of tokens with u > 0 in each source, and of those whose sequence is not known, float64 (source + 1, m).
        tallies: Numbers of tokens, float64 (source + 4,): in each source, without a known sequence, at first positions, that
            are delimiters, and of which it is not known whether they are.
    """

    def __init__(self, wanted: Wanted, n_channels: int, device: torch.device) -> None:
        self.wanted = wanted
        self.peak = torch.zeros(n_channels, dtype=torch.int64, device=device)
        self.drivers = DrivingTokens(wanted.drivers, n_channels, device) if DRIVERS in wanted.groups else None
        self.first = torch.zeros(_MOMENTS, n_channels, dtype=torch.float64, device=device)
        self.delimiter = torch.zeros(_MOMENTS, n_channels, dtype=torch.float64, device=device)
        self.active = torch.zeros(wanted.sources + 1, n_channels, dtype=torch.float64, device=device)
        self.tallies = torch.zeros(wanted.sources + 4, dtype=torch.float64, device=device)

    def add(self, u: torch.Tensor, q: torch.Tensor, rows: Rows) -> None:
        """Add the tokens of ``rows``: write inputs ``u`` and their products ``q`` with dL/du, both (..., m)."""
        u, q = u.reshape(-1, u.shape[-1]), q.reshape(-1, q.shape[-1])
        if PEAKS in self.wanted.groups:
            self.peak = torch.maximum(self.peak, _peaks(u, rows))
        if self.drivers is not None:
            self.drivers.add(u, rows.numbers)
        if rows.in_order:
            self._add_in_order(u, q, rows)
        else:
            self._add_scattered(u, q, rows)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, by the name that they have in a partial atlas."""
        found = {"column_peak": self.peak, **dict(zip(_ADDITIVE, self.additive(), strict=True))}
        return found if self.drivers is None else found | {"column_drivers": self.drivers.packed()}

    def additive(self) -> list[torch.Tensor]:
        """The tensors that are sums over tokens."""
        return [self.first, self.delimiter, self.active, self.tallies]

    def _add_in_order(self, u: torch.Tensor, q: torch.Tensor, rows: Rows) -> None:
        source_of, sources = rows.batch.source_of.to(u.device), self.wanted.sources
        sequences = len(source_of)
        self.tallies.index_add_(0, source_of, torch.full_like(source_of, rows.length, dtype=torch.float64))
        if ACTIVITY in self.wanted.groups:
            self.active.index_add_(0, source_of, (u > 0).to(u.dtype).view(sequences, rows.length, -1).sum(1).double())
        if POSITIONS in self.wanted.groups:
            self.first += _powers(u[:: rows.length], q[:: rows.length])
            self.tallies[sources + 1] += sequences
            self._add_delimiters(u, q, None if rows.delimiters is None else rows.delimiters.chosen.to(u.device))

    def _add_scattered(self, u: torch.Tensor, q: torch.Tensor, rows: Rows) -> None:
        sources, length = self.wanted.sources, max(1, rows.length)
        origin = rows.origin(len(u), u.device)
        known, place = origin >= 0, origin.clamp(min=0)
        source = torch.where(known, rows.batch.source_of.to(u.device)[place // length], sources)
        self.tallies.index_add_(0, source, torch.ones_like(source, dtype=torch.float64))
        if ACTIVITY in self.wanted.groups:
            self.active.index_add_(0, source, (u > 0).double())
        if POSITIONS in self.wanted.groups:
            chosen = (known & (place % length == 0)).nonzero()[:, 0]
            self.first += _powers(u[chosen], q[chosen])
            self.tallies[sources + 1] += len(chosen)
            inside = None if rows.delimiters is None else known & rows.delimiters.mask.to(u.device)[place]
            self._add_delimiters(u, q, None if inside is None else inside.nonzero()[:, 0])

    def _add_delimiters(self, u: torch.Tensor, q: torch.Tensor, chosen: torch.Tensor | None) -> None:
        if chosen is None:
            self.tallies[self.wanted.sources + 3] += len(u)
            return
        self.delimiter += _powers(u[chosen], q[chosen])
        self.tallies[self.wanted.sources + 2] += len(chosen)


_ADDITIVE = ("column_first", "column_delimiter", "column_active", "column_tallies")


def unpacked(peak: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest |u|, float32 (m,), and the number of its row, int64 (m,), -1 if it is not known; of `ColumnSums.peak`."""
    low = peak & 0xFFFFFFFF
    return (peak >> 32).int().view(torch.float32), torch.where(low > 0, LARGEST_ROW + 1 - low, -1)


def row_hashes(x: torch.Tensor) -> torch.Tensor:
    """One number for each row of ``x`` (row, d), int64; rows with the same bits have the same number."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (x.shape[-1],), generator=generator) | 1
    return (x.contiguous().view(bits).long() * factors.to(x.device)).sum(-1)


def find_rows(rows: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Index in ``among`` of each of ``rows``, both as `row_hashes`; -1 if it is not there.

    Of rows that are equal, the first takes the first index, the second the second, and so on.
    """
    order, place = among.argsort(stable=True), rows.argsort(stable=True)
    sorted_among, sorted_rows = among[order], rows[place]
    occurrence = torch.arange(len(rows), device=rows.device) - torch.searchsorted(sorted_rows, sorted_rows)
    index = torch.searchsorted(sorted_among, sorted_rows) + occurrence
    inside = index.clamp(max=len(among) - 1)
    found = torch.where((index < len(among)) & (sorted_among[inside] == sorted_rows), order[inside], -1)
    return torch.empty_like(found).index_copy_(0, place, found)


def _peaks(u: torch.Tensor, rows: Rows) -> torch.Tensor:
    """`ColumnSums.peak` of the rows ``u`` (row, m) alone."""
    # The largest |u| of each run of rows first, and then its row in one run per channel: torch finds indices slowly.
    count, width = u.shape
    whole = count // _RUN * _RUN
    runs = [_largest(u[:whole].view(-1, _RUN, width), 1)] if whole else []
    if whole < count:
        runs.append(_largest(u[whole:], 0)[None])
    of_runs = torch.cat(runs)
    best = of_runs.argmax(0)
    inside = (best[:, None] * _RUN + torch.arange(_RUN, device=u.device)).clamp_(max=count - 1)
    row = inside.gather(1, u[inside, torch.arange(width, device=u.device)[:, None]].abs().float().argmax(1, keepdim=True))[:, 0]
    value = of_runs.gather(0, best[None])[0].contiguous().view(torch.int32).long()
    number = rows.numbers(row)
    return (value << 32) | torch.where(number >= 0, LARGEST_ROW + 1 - number, 0)


def _largest(u: torch.Tensor, axis: int) -> torch.Tensor:
    """The largest |u| along ``axis``, float32."""
    return torch.maximum(u.amax(axis), -u.amin(axis)).float()


def _powers(u: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Sums of u^2 and q^2 over rows, float64 (2, m)."""
    return torch.stack([u.double().square().sum(0), q.double().square().sum(0)])
