"""The well-known columns that a build measures on request: what is asked for, what a pass needs for it, and their values."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from chanfmt.base.errors import UsageError
from chanfmt.base.narrate import say
from chanfmt.building.column_sums import LARGEST_ROW, BatchRows, Delimiters, Wanted, unpacked
from chanfmt.building.driving import LARGEST_DRIVING_ROW, unpacked_drivers
from chanfmt.building.loss import MaskedTokenLoss, ReconstructionLoss
from chanfmt.data.tokens import CalibrationTokens
from chanfmt.format.columns import ACTIVITY, DRIVERS, DRIVERS_KEPT, OWNER, PEAKS, POSITIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from chanfmt.building.loss import Loss
    from chanfmt.building.statistics import ChannelStatistics, FFNStatistics
    from chanfmt.data.arrays import CalibrationInputs
    from chanfmt.models.ffn import FFN
    from chanfmt.models.matrices import FFNWeights

_PART = 1024
"""Columns of a matrix that are worked on at a time."""
_LINE_BREAKS = frozenset("\n\r\v\f\x85\u2028\u2029")


@dataclass(frozen=True)
class ColumnPlan:
    """The columns of a build, and what is known of the sequences that they rest on.

    Attributes:
        wanted: What the pass accumulates for.
        stride: See `chanfmt.building.column_sums.BatchRows`.
        source_of: Source of each sequence, int32 (sequence,).
        ids: Place of an FFN to the token ids that the FFNs there read, int (sequence, position); empty for arrays.
        delimiters: Ids of the tokens that count as delimiters, among the ids in ``ids``; ascending.
    """

    wanted: Wanted
    stride: int
    source_of: np.ndarray
    ids: Mapping[str, np.ndarray]
    delimiters: np.ndarray

    @property
    def named(self) -> str:
        """The groups, and how many driving tokens there are of each channel."""
        return ",".join(f"{group}={self.wanted.drivers}" if group == DRIVERS else group for group in self.wanted.groups)

    def batch(self, start: int, stop: int, device: torch.device) -> BatchRows:
        """What is known of the sequences ``start`` to ``stop`` (excluded), on ``device``."""
        delimiters = {}
        for place, ids in self.ids.items() if POSITIONS in self.wanted.groups else ():
            mask = torch.from_numpy(self._inside(ids[start:stop]).reshape(-1))
            delimiters[place] = Delimiters(ids.shape[1], mask.to(device), mask.nonzero()[:, 0].to(device))
        source_of = torch.from_numpy(self.source_of[start:stop].astype(np.int64)).to(device)
        return BatchRows(start, self.stride, source_of, delimiters)

    def attributes(self, place: str) -> dict[str, Any]:
        """What the atlas says about the columns of the FFNs of ``place``, besides their values."""
        found: dict[str, Any] = {"columns": ", ".join(self.wanted.groups)}
        if POSITIONS in self.wanted.groups:
            found["delimiter_ids"] = len(self.delimiters)
            found["delimiter_tokens"] = int(self._inside(self.ids[place]).sum())
        return found

    def _inside(self, ids: np.ndarray) -> np.ndarray:
        """Whether each of ``ids`` (sequence, position) is a delimiter behind the first position, bool."""
        found: np.ndarray = np.isin(ids, self.delimiters)
        found[:, 0] = False
        return found


def plan_columns(
    groups: tuple[str, ...],
    tokens: CalibrationTokens | CalibrationInputs,
    ffns: Sequence[FFN],
    loss: Loss,
    tokenizer: Any,
    *,
    everything: bool,
    drivers: int = DRIVERS_KEPT,
    stored: bool = True,
) -> ColumnPlan | None:
    """Plan the columns of ``groups`` for a build on ``tokens``. None if there are none.

    Args:
        everything: Whether the groups were asked for as "all", which leaves out those that the build cannot have.
        drivers: Number of driving tokens of each channel, if they are among ``groups``.
        stored: Whether the atlas will hold the token ids.

    Raises:
        UsageError: A group needs tokens, and the build is on arrays or does not store them; or there are too many tokens.
    """
    if not groups:
        return None
    for group, missing, instead in _impossible(tokens, stored=stored):
        if group in groups and not everything:
            raise UsageError(f"--columns {group} needs token ids, and {missing}", hint=instead)
        if group in groups:
            say(f"note: no columns of {group}: they need token ids, and {missing}")
            groups = tuple(one for one in groups if one != group)
    most = LARGEST_DRIVING_ROW if DRIVERS in groups else LARGEST_ROW
    if len(tokens) * tokens.rows > most:
        raise UsageError(f"--columns is for at most {most} tokens", hint="use fewer --sequences, or --columns none")
    ids = {}
    if isinstance(tokens, CalibrationTokens):
        ids = {place: read_ids(loss, tokens.ids, place) for place in sorted({ffn.place for ffn in ffns})}
    delimiters = np.empty(0, dtype=np.int64)
    if POSITIONS in groups:
        delimiters = delimiter_ids(tokenizer, np.unique(np.concatenate([values.reshape(-1) for values in ids.values()])))
    sources = int(tokens.source_of.max(initial=0)) + 1
    wanted = Wanted(groups, sources, drivers if DRIVERS in groups else 0)
    return ColumnPlan(wanted, tokens.rows, tokens.source_of, ids, delimiters)


def _impossible(tokens: CalibrationTokens | CalibrationInputs, *, stored: bool) -> list[tuple[str, str, str]]:
    """The groups that a build on ``tokens`` cannot have, each with the reason and what to do."""
    if not isinstance(tokens, CalibrationTokens):
        instead = f"use --columns {PEAKS},{ACTIVITY}"
        return [(group, "the calibration consists of other arrays", instead) for group in (POSITIONS, DRIVERS)]
    return [] if stored else [(DRIVERS, "the atlas would not hold them", "leave out --no-store-tokens")]


def read_ids(loss: Loss, ids: np.ndarray, place: str) -> np.ndarray:
    """The token ids that the FFNs of ``place`` read when ``loss`` runs ``ids``, int (sequence, position)."""
    if isinstance(loss, MaskedTokenLoss):
        return loss.masked(torch.from_numpy(ids).long())[0].numpy()
    if isinstance(loss, ReconstructionLoss) and place == "decoder":
        return loss.shifted(torch.from_numpy(ids).long()).numpy()
    return ids


def delimiter_ids(tokenizer: Any, ids: Iterable[int]) -> np.ndarray:
    """Those of ``ids`` that count as delimiters (columns-1.md, "Delimiters"), int64."""
    special = {int(token) for token in getattr(tokenizer, "all_special_ids", None) or ()}
    ordinary = [int(token) for token in ids if int(token) not in special]
    texts = (tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ordinary)
    return np.array([token for token, text in zip(ordinary, texts, strict=True) if is_delimiter(text)], dtype=np.int64)


def is_delimiter(text: str) -> bool:
    """Whether ``text`` consists of punctuation and line breaks, with or without white space around them.

    >>> [is_delimiter(text) for text in (" .", "\\n\\n", " ", "a.", "+")]
    [True, True, False, False, False]
    """
    rest = [letter for letter in text if letter in _LINE_BREAKS or not letter.isspace()]
    return bool(rest) and all(letter in _LINE_BREAKS or unicodedata.category(letter).startswith("P") for letter in rest)


def ffn_columns(plan: ColumnPlan, statistics: FFNStatistics, weights: Iterable[FFNWeights], place: str) -> dict[str, np.ndarray]:
    """The columns of one FFN of ``place``: name to values (m,), or (expert, m); for driving tokens, with the dimension ``driver`` last."""
    found = [
        _member_columns(plan, member, of_member, place) for member, of_member in zip(statistics.members, weights, strict=True)
    ]
    return {name: np.stack([row[name] for row in found]) for name in found[0]} if statistics.experts else found[0]


def untraced(statistics: FFNStatistics) -> bool:
    """Whether the FFN or an expert of it had rows of which no token is known."""
    sums = [member.columns for member in statistics.members if member.columns is not None]
    return any(float(item.tallies[item.wanted.sources]) > 0 for item in sums)


def _member_columns(plan: ColumnPlan, statistics: ChannelStatistics, weights: FFNWeights, place: str) -> dict[str, np.ndarray]:
    groups = plan.wanted.groups
    found: dict[str, np.ndarray] = {}
    if PEAKS in groups:
        found |= _peaks(plan, statistics, weights.write, place)
    if POSITIONS in groups:
        found |= _positions(plan, statistics)
    if ACTIVITY in groups:
        found |= _activity(plan, statistics)
    if DRIVERS in groups:
        found |= _drivers(plan, statistics)
    return {f"{OWNER}/{name}": values for name, values in found.items()}


def _peaks(plan: ColumnPlan, statistics: ChannelStatistics, write: torch.Tensor, place: str) -> dict[str, np.ndarray]:
    assert statistics.columns is not None
    value, row = (tensor.cpu().numpy() for tensor in unpacked(statistics.columns.peak))
    # A channel that is 0 on all tokens has no token on which it is largest.
    known = (row >= 0) & (value > 0)
    sequence, position = np.divmod(np.where(known, row, 0), plan.stride)
    weight, write_row = _largest_weights(write)
    found = {
        "super_weight": (value.astype(np.float64) * weight).astype(np.float32),
        "super_weight_row": write_row.astype(np.int32),
        "peak_sequence": np.where(known, sequence, -1).astype(np.int32),
        "peak_position": np.where(known, position, -1).astype(np.int32),
    }
    ids = plan.ids.get(place)
    if ids is not None:
        inside = known & (position < ids.shape[1])
        token = ids[np.where(inside, sequence, 0), np.where(inside, position, 0)]
        found["peak_token"] = np.where(inside, token, -1).astype(np.int32)
    return found


def _largest_weights(write: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The largest |w| in each column of ``write`` (d, m), float64 (m,), and its row, int64 (m,); the first of equal ones."""
    values, rows = [], []
    for part in write.detach().split(_PART, dim=1):
        magnitude = part.T.contiguous().to(torch.float64 if part.dtype == torch.float64 else torch.float32).abs_()
        row = magnitude.argmax(1)
        values.append(magnitude.gather(1, row[:, None])[:, 0].double().cpu())
        rows.append(row.cpu())
    return torch.cat(values).numpy(), torch.cat(rows).numpy()


def _positions(plan: ColumnPlan, statistics: ChannelStatistics) -> dict[str, np.ndarray]:
    sums = statistics.columns
    assert sums is not None
    *_, lost, _, _, undecided = sums.tallies.cpu().tolist()
    found = {}
    for name, values, known in (("first", sums.first, not lost), ("delimiter", sums.delimiter, not lost and not undecided)):
        for suffix, share, part, whole in (
            ("sum_u2", "power_share", values[0], statistics.sums["sum_u2"]),
            ("sum_q2", "lp_share", values[1], statistics.sums["sum_q2"]),
        ):
            own = part.cpu().numpy() if known else np.full(statistics.n_channels, np.nan)
            found[f"{name}_{suffix}"] = own
            # The whole is a sum of float32 sums, so a part of almost everything may exceed it by rounding.
            found[f"{name}_{share}"] = np.minimum(_ratio(own, whole.cpu().numpy()), 1).astype(np.float32)
    return found


def _activity(plan: ColumnPlan, statistics: ChannelStatistics) -> dict[str, np.ndarray]:
    sums = statistics.columns
    assert sums is not None
    active = sums.active.cpu().numpy()
    total = active.sum(0)
    sources = plan.wanted.sources
    found = {
        "active_tokens": total.astype(np.int64),
        "firing_rate": _ratio(total, np.full_like(total, statistics.tokens)).astype(np.float32),
    }
    if sources > 1:
        tallies = sums.tallies.cpu().numpy()
        tokens, lost = tallies[:sources], tallies[sources]
        entropy = np.full(statistics.n_channels, np.nan)
        if not lost and (tokens > 0).sum() > 1:
            rates = active[:sources][tokens > 0] / tokens[tokens > 0, None]
            share = _ratio(rates, rates.sum(0))
            # A source without active tokens adds 0: the limit of -p log p.
            terms = np.where(share > 0, -share * np.log(np.where(share > 0, share, 1)), share * 0)
            entropy = np.maximum(terms.sum(0), 0)
        found["source_entropy"] = entropy.astype(np.float32)
    return found


def _drivers(plan: ColumnPlan, statistics: ChannelStatistics) -> dict[str, np.ndarray]:
    assert statistics.columns is not None
    assert statistics.columns.drivers is not None
    value, row = (tensor.T.cpu().numpy() for tensor in unpacked_drivers(statistics.columns.drivers.packed()))
    sequence, position = np.divmod(np.where(row >= 0, row, 0), plan.stride)
    return {
        # Fewer tokens than asked for may have driven the channel at all.
        "driving_value": np.where(value != 0, value, np.nan).astype(np.float32),
        "driving_sequence": np.where(row >= 0, sequence, -1).astype(np.int32),
        "driving_position": np.where(row >= 0, position, -1).astype(np.int32),
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """``part`` / ``whole``, float64; NaN where ``whole`` is 0."""
    whole = np.broadcast_to(whole, part.shape)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)
