"""Exact sufficient statistics of an FFN's channels, accumulated on the device."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from chanfmt.algebra import labels
from chanfmt.analysis.chance import turn_offset
from chanfmt.building.column_sums import ColumnSums, Wanted
from chanfmt.building.input_sums import POWER, TOKENS, InputSums
from chanfmt.format import schema
from chanfmt.format.columns import REDUNDANCY_CHANCE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chanfmt.building.column_sums import Rows
    from chanfmt.building.driving import DrivingTokens
    from chanfmt.models.distributed import Group
    from chanfmt.models.ffn import FFN

CANDIDATE_SHARE = 0.05
"""Share of the channels kept as candidates for the core while redundancy is accumulated."""
_SUMMED = ("sum_u", "sum_u2", "sum_s2", "sum_abs_q", "sum_q", "sum_q2")
"""The variables `schema.SUMS`, in the order in which `ChannelStatistics.add` computes them: the moments of q come last."""
_LAST = ("last", "last_total", "last_q2")
REDUCED = schema.resting_on(schema.CORRELATIONS)
"""Names of the arrays that the cross moments with the core are reduced to, all of them variables of the atlas."""
CHANCE = REDUNDANCY_CHANCE.rpartition("/")[2]
"""Name of the further array that they are reduced to, which becomes a well-known column."""


class ChannelStatistics:
    """Sums over tokens for the m channels of one dense FFN or one expert (spec section "Sums").

    Products are formed in float32, or in float64 if the model is in float64. Each sequence is summed in that precision, and
    sequences add up in float64. For an expert, the tokens of one batch count as one sequence.

    Args:
        n_channels: Number of channels, m.
        read_inputs: Length of the vectors that the read projections read.
        device: Device of the sums.
        routed: Whether only some tokens of each sequence arrive, so that the tokens of two sequences do not correspond.
        wanted: The columns to accumulate for besides.
    """

    def __init__(
        self, n_channels: int, read_inputs: int, device: torch.device, *, routed: bool = False, wanted: Wanted | None = None
    ) -> None:
        self.n_channels = n_channels
        self.device = device
        self.routed = routed
        self._rows = self._zeros(len(_SUMMED), n_channels)
        self.sums = {variable.name: self._rows[_SUMMED.index(variable.name)] for variable in schema.SUMS}
        self.split_q2 = self._zeros(schema.SPLITS, n_channels)
        self.max_abs_u = torch.zeros(n_channels, device=device)
        self.tokens_split = np.zeros(schema.SPLITS, dtype=np.int64)
        self.read_power = self._zeros(read_inputs)
        self.core: CoreCorrelation | None = None
        self.reduced: dict[str, np.ndarray] | None = None
        self.columns = ColumnSums(wanted, n_channels, device) if wanted is not None and wanted.groups else None

    def add_read_power(self, power: torch.Tensor) -> None:
        """Add ``power``, the `chanfmt.building.input_sums.squares` of inputs of the reads."""
        self.read_power += power.to(self.device)

    def add(self, u: torch.Tensor, s: torch.Tensor, split: int, rows: Rows | None = None) -> None:
        """Add tokens that all belong to ``split``.

        Args:
            u: Write inputs, (sequence, token, m).
            s: dL/du of the summed loss, same shape.
            rows: Where the tokens come from, if columns are accumulated.
        """
        if not u.numel():
            return
        u, s = _wide(u), _wide(s)
        q = u * s
        # One tensor for all sums: experts get few tokens each, and what they cost is the number of operations.
        found = torch.empty(len(_SUMMED), len(u), self.n_channels, dtype=u.dtype, device=u.device)
        row = found.unbind()
        torch.sum(u, 1, out=row[0])
        torch.sum(u.square(), 1, out=row[1])
        torch.sum(s.square(), 1, out=row[2])
        torch.sum(q.abs(), 1, out=row[3])
        torch.sum(q, 1, out=row[4])
        torch.sum(q.square(), 1, out=row[5])
        of_sequences = found.double()
        total = of_sequences.sum(1)
        self._rows += total
        self.split_q2[split] += total[-1]
        largest = torch.maximum(u.amax((0, 1)), -u.amin((0, 1)))
        self.max_abs_u = torch.maximum(self.max_abs_u, largest.float())
        self.tokens_split[split] += u.shape[0] * u.shape[1]
        if self.core is not None:
            self.core.add(q, of_sequences[-2:])
        if self.columns is not None and rows is not None:
            self.columns.add(u, q, rows)

    def choose_core(self, rho: float) -> None:
        """Fix the candidate core from the tokens so far and start correlating with it."""
        lp = self.sums["sum_q2"].cpu().numpy()
        self.set_core(torch.from_numpy(labels.top_indices(lp, self.candidate_count(rho))))

    def candidate_count(self, rho: float) -> int:
        """Number of candidates for the core, c."""
        count = max(math.ceil(CANDIDATE_SHARE * self.n_channels), 2 * labels.supernode_count(self.n_channels, rho))
        return min(count, self.n_channels)

    def set_core(self, candidates: torch.Tensor) -> None:
        """Start correlating with ``candidates``, channel indices (c,)."""
        self.core = CoreCorrelation(candidates.to(self.device), self.n_channels, routed=self.routed)

    def reduce(self, variables: dict[str, np.ndarray]) -> None:
        """Keep ``variables`` (`REDUCED` and `CHANCE`) in place of the cross moments, which take most of the memory. Nothing can be added then."""
        self.core, self.reduced = None, variables

    @property
    def tokens(self) -> int:
        """Tokens added so far."""
        return int(self.tokens_split.sum())

    @property
    def nbytes(self) -> int:
        """Bytes in `state`."""
        return sum(values.nbytes for values in self._tensors().values())

    def state(self) -> dict[str, np.ndarray]:
        """Everything accumulated so far, by name, for `restore`. On a CPU it is valid until the next batch only."""
        state = {name: values.cpu().numpy() for name, values in self._tensors().items()}
        state["tokens_split"] = self.tokens_split
        if self.core is not None:
            state |= {
                "real_count": np.asarray(self.core.real.count),
                "null_count": np.asarray(self.core.null.count),
                "offsets_drawn": np.asarray(self.core.offsets_drawn),
            }
        return state | (self.reduced or {})

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over the `state` of another instance for the same FFN. What is added then gives the same bits as it would there."""
        if "candidates" in state:
            self.set_core(torch.from_numpy(np.array(state["candidates"])))
            assert self.core is not None
            self.core.real.count, self.core.null.count = int(state["real_count"]), int(state["null_count"])
            self.core.offsets_drawn = int(state["offsets_drawn"])
            if "last" in state:
                self.core.last = tuple(torch.from_numpy(np.array(state[name])).to(self.device)[None] for name in _LAST)
        for name, values in self._tensors().items():
            # Rows that were stacked with longer rows are padded.
            values.copy_(torch.from_numpy(np.array(state[name])[tuple(map(slice, values.shape))]))
        self.tokens_split = np.array(state["tokens_split"])
        if REDUCED[0] in state:
            self.reduced = {name: np.asarray(state[name]) for name in (*REDUCED, CHANCE)}

    def counts(self) -> torch.Tensor:
        """Numbers of tokens in each split, in the cross moments and in their null, float64 (SPLITS + 2,). They add up like sums."""
        pairs = (0, 0) if self.core is None else (self.core.real.count, self.core.null.count)
        return torch.tensor([*self.tokens_split, *pairs], dtype=torch.float64, device=self.device)

    def set_counts(self, counts: torch.Tensor) -> None:
        """Take over `counts`."""
        *tokens, real, null = (int(count) for count in counts.tolist())
        self.tokens_split[:] = tokens
        if self.core is not None:
            self.core.real.count, self.core.null.count = real, null

    def additive(self) -> list[torch.Tensor]:
        """Every tensor that is a sum over tokens."""
        pairs = () if self.core is None else (self.core.real, self.core.null)
        moments = (tensor for pair in pairs for tensor in (pair.cross, pair.channel, pair.other))
        chance = () if self.core is None else (self.core.chance_cross,)
        columns = [] if self.columns is None else self.columns.additive()
        return [*self.sums.values(), self.split_q2, self.read_power, *moments, *chance, *columns]

    def _tensors(self) -> dict[str, torch.Tensor]:
        own = {**self.sums, "sum_q2_split": self.split_q2, "max_abs_u": self.max_abs_u, "read_power": self.read_power}
        if self.columns is not None:
            own |= self.columns.tensors()
        return own if self.core is None else own | self.core.tensors()

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)


class FFNStatistics:
    """The statistics of one FFN: one `ChannelStatistics`, or one per routed expert; and the inputs of other maps of its block."""

    def __init__(self, ffn: FFN, device: torch.device, wanted: Wanted | None = None) -> None:
        routed = bool(ffn.experts) or ffn.uses > 1
        self.experts = ffn.experts
        self.members = [ChannelStatistics(ffn.width, ffn.read_inputs, device, routed=routed, wanted=wanted) for _ in ffn.members]
        self.other_maps = InputSums(ffn.other_maps, device)

    @property
    def nbytes(self) -> int:
        """Bytes in `state`."""
        return sum(member.nbytes for member in self.members) + self.other_maps.nbytes

    def total(self) -> torch.Tensor:
        """A number that is finite if every activation and every gradient so far was finite, on the device of the sums."""
        squares = [member.sums[name] for member in self.members for name in ("sum_u2", "sum_s2", "sum_q2")]
        return torch.stack(squares).sum()

    def collect(self, group: Group) -> None:
        """Move the sums of all processes of ``group`` to the first one. The others continue from zero."""
        counts = [member.counts() for member in self.members]
        tokens = self.other_maps.counts()
        group.collect(
            [*counts, *(tensor for member in self.members for tensor in member.additive()), tokens, *self.other_maps.power],
            [member.max_abs_u for member in self.members],
        )
        peaks = [member.columns.peak for member in self.members if member.columns is not None]
        if peaks:
            # Apart from the other maxima, because tensors that travel together have one dtype.
            group.collect([], peaks)
        sums = [member.columns for member in self.members if member.columns is not None]
        _collect_drivers(group, [item.drivers for item in sums if item.drivers is not None])
        for member, count in zip(self.members, counts, strict=True):
            member.set_counts(count)
        self.other_maps.set_counts(tokens)

    def state(self) -> dict[str, np.ndarray]:
        """`ChannelStatistics.state`, for experts with the dimension ``expert`` at its place in the atlas; and `InputSums.state`."""
        states = [member.state() for member in self.members]
        if not self.experts:
            return states[0] | self.other_maps.state()
        joined = {name: np.stack([state[name] for state in states], axis=_expert_axis(name)) for name in states[0]}
        return joined | self.other_maps.state()

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over the `state` of another instance for the same FFN."""
        self.other_maps.restore(state)
        state = {name: values for name, values in state.items() if name not in (POWER, TOKENS)}
        for index, member in enumerate(self.members):
            member.restore(
                {name: np.take(values, index, _expert_axis(name)) for name, values in state.items()} if self.experts else state
            )


def _collect_drivers(group: Group, drivers: Sequence[DrivingTokens]) -> None:
    """Move the driving tokens of all processes to the first one. The others continue from zero."""
    if not drivers:
        return
    found = group.exchange([item.packed().cpu() for item in drivers])
    for number, item in enumerate(drivers):
        if group.rank:
            item.packed().zero_()
        for theirs in found[1:] if group.rank == 0 else ():
            item.take(theirs[number])


def first_overflow(statistics: Sequence[FFNStatistics]) -> int | None:
    """Number of the first of ``statistics`` in which an activation or a gradient was not finite; None if all were finite."""
    # One look at the device for all FFNs: a look for each would wait for a GPU, and leave it idle.
    totals = [item.total() for item in statistics]
    finite = torch.isfinite(torch.stack([total.to(totals[0].device) for total in totals])) if totals else torch.ones(0)
    return next((number for number, whole in enumerate(finite.tolist()) if not whole), None)


def _expert_axis(name: str) -> int:
    variable = schema.STACK_VARIABLE_BY_NAME.get(name)
    return variable.dimensions.index("layer") if variable is not None else 0


class CoreCorrelation:
    """Cross moments of q between all channels and c candidates, and the same of two nulls.

    Both nulls pair the q of each sequence with the candidates' q of the sequence before it: same marginals, no shared text.
    The first null pairs equal positions, so that what comes from the position stays. The second null, which says what chance
    alone gives, turns the candidates' sequence by an offset, so that other positions meet. Turning keeps the order of the
    tokens: a channel that is large on several tokens in a row still is. The tokens of one sequence move together for the same
    reason; an offset for every token would make the null too small.

    Tokens that were routed to an expert are paired with tokens half a batch away, and in the second null with tokens at least
    a quarter of a batch away. If several processes measure, the sequence before is the previous one in the same process; the
    real moments do not depend on the number of processes.

    Attributes:
        offsets_drawn: Number of sequences of the second null, which choose the next offset.
    """

    def __init__(self, candidates: torch.Tensor, n_channels: int, *, routed: bool = False) -> None:
        self.candidates = candidates
        self.routed = routed
        self.real = PairSums(n_channels, len(candidates), candidates.device)
        self.null = PairSums(n_channels, len(candidates), candidates.device)
        # Turning a sequence leaves the sums of each side as they are. The products of unrelated sequences stay as small as
        # chance makes them, so that the rounding of float32 is far below the null, and half of the memory suffices.
        self.chance_cross = torch.zeros_like(self.null.cross, dtype=torch.float32)
        self.offsets_drawn = 0
        self.last: tuple[torch.Tensor, ...] | None = None

    @property
    def chance(self) -> PairSums:
        """The sums of the second null."""
        sums = copy.copy(self.null)
        sums.cross = self.chance_cross.double()
        return sums

    def add(self, q: torch.Tensor, moments: torch.Tensor) -> None:
        """Add q (sequence, token, m) with ``moments`` (2, sequence, m): its sums and its sums of squares over the tokens."""
        core, of_core = q[..., self.candidates], moments[..., self.candidates]
        sums = moments.sum(1), of_core.sum(1)
        self.real.add(q, core, *sums)
        count = q.shape[1]
        if self.routed:
            if count > 1:
                self.null.add(q, core.roll(count // 2, 1), *sums)
                self._add_chance(q, core, max(1, count // 4))
            return
        if self.last is None:
            q, moments, others, of_others = q[1:], moments[:, 1:], core[:-1], of_core[:, :-1]
        else:
            before, *of_before = self.last
            others = torch.cat([before, core[:-1]])
            of_others = torch.cat([torch.stack(of_before), of_core[:, :-1]], 1)
        self.null.add(q, others, moments.sum(1), of_others.sum(1))
        self._add_chance(q, others, min(1, count - 1))
        self.last = (core[-1:].clone(), of_core[0, -1:].clone(), of_core[1, -1:].clone())

    def _add_chance(self, q: torch.Tensor, other: torch.Tensor, least: int) -> None:
        """Add the q of channels (sequence, token, m) and of candidates (sequence, token, c), turned by ``least`` tokens or more."""
        turned = [row.roll(turn_offset(self.offsets_drawn + place, len(row), least), 0) for place, row in enumerate(other)]
        if turned:
            self.offsets_drawn += len(turned)
            self.chance_cross += q.reshape(-1, q.shape[-1]).T @ torch.cat(turned)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors between two batches, by name."""
        tensors = {"candidates": self.candidates, "chance_cross": self.chance_cross}
        for name, pair in (("real", self.real), ("null", self.null)):
            tensors |= {f"{name}_cross": pair.cross, f"{name}_channel": pair.channel, f"{name}_other": pair.other}
        if self.last is not None:
            tensors |= {name: values[0] for name, values in zip(_LAST, self.last, strict=True)}
        return tensors


class PairSums:
    """The raw sums from which Pearson correlations between m channels and c candidates follow."""

    def __init__(self, n_channels: int, n_others: int, device: torch.device) -> None:
        self.count = 0
        self.cross = torch.zeros(n_channels, n_others, dtype=torch.float64, device=device)
        self.channel = torch.zeros(2, n_channels, dtype=torch.float64, device=device)
        self.other = torch.zeros(2, n_others, dtype=torch.float64, device=device)

    def add(
        self,
        q: torch.Tensor,
        other: torch.Tensor,
        channel: torch.Tensor,
        of_other: torch.Tensor,
    ) -> None:
        """Add q of the channels (sequence, token, m) and of the candidates (sequence, token, c), and their moments (2, m), (2, c)."""
        if not len(q):
            return
        self.count += q.shape[0] * q.shape[1]
        self.cross += q.reshape(-1, q.shape[-1]).T @ other.reshape(-1, other.shape[-1])
        self.channel += channel
        self.other += of_other


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
