"""How many channels each FFN keeps if all FFNs share one pool of channels. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from surgery.planning.width import default_multiple, nearest_multiple

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, eq=False)
class Candidate:
    """An FFN in the pool.

    Attributes:
        width: Its channels, of each expert if it has experts.
        units: The number of its experts, or 1 for a dense FFN. One removal removes that many channels.
        ladder: Score of the first removal, of the second, ...; float64 (removals,), ascending. It has one entry per
            removal that is allowed, fewer than ``width``.
    """

    width: int
    units: int
    ladder: np.ndarray

    @property
    def fewest(self) -> int:
        """Smallest number of channels that the FFN keeps."""
        return self.width - len(self.ladder)


def ladder(scores: np.ndarray, protected: np.ndarray, most: int) -> np.ndarray:
    """The score of each removal from an FFN, ascending, float64 (most,).

    All experts keep the same number of channels. The k-th removal takes the unprotected channel with the k-th lowest
    score from every expert, and its score is the mean of theirs.

    Args:
        scores, protected: float64 and bool (expert, channels); one row for a dense FFN.
        most: Removals that are allowed. Every row has at least that many unprotected channels.
    """
    return np.sort(np.where(protected, np.inf, scores), axis=-1)[:, :most].mean(axis=0)


class Pool:
    """FFNs that share one number of kept channels. Everything that does not depend on that number is computed once.

    Removals leave the pool in the order of their scores. If scores are equal, removals from the last FFN come first.
    """

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._candidates = candidates
        self._units = np.array([item.units for item in candidates])
        owner = np.concatenate([np.full(len(item.ladder), index) for index, item in enumerate(candidates)])
        rank = np.concatenate([np.arange(len(item.ladder)) for item in candidates])
        order = np.lexsort((rank, -owner, np.concatenate([item.ladder for item in candidates])))
        self._owner = owner[order]
        self._taken = np.cumsum(self._units[self._owner])

    def widths(self, keep: int, multiple_of: int | None = None) -> list[int]:
        """Kept widths, one per FFN, such that ``keep`` channels stay in total, or as close to that as multiples allow.

        Each width is rounded as for uniform allocation. Then single widths move by one multiple until the total is right;
        the width that moves least away from its target, per channel gained, moves first.

        Raises:
            ValueError: More than ``keep`` channels must stay.
        """
        candidates = self._candidates
        if sum(item.units * item.fewest for item in candidates) > keep:
            raise ValueError("more must stay than may")
        targets = self._targets(keep)
        steps = [multiple_of or default_multiple(item.width, target) for item, target in zip(candidates, targets, strict=True)]
        choices = [_choices(item, step) for item, step in zip(candidates, steps, strict=True)]
        places = [
            _nearest(widths, nearest_multiple(target, step)) for widths, target, step in zip(choices, targets, steps, strict=True)
        ]
        units = [item.units for item in candidates]
        excess = sum(count * widths[place] for count, widths, place in zip(units, choices, places, strict=True)) - keep
        while excess:
            turn = -1 if excess > 0 else 1
            best: tuple[float, int, int] | None = None
            for index, (widths, place) in enumerate(zip(choices, places, strict=True)):
                if not 0 <= place + turn < len(widths):
                    continue
                moved = widths[place + turn] - widths[place]
                left = excess + units[index] * moved
                farther = abs(widths[place + turn] - targets[index]) - abs(widths[place] - targets[index])
                if abs(left) < abs(excess) and (best is None or (farther / abs(moved), index) < best[:2]):
                    best = farther / abs(moved), index, left
            if best is None:
                break
            places[best[1]] += turn
            excess = best[2]
        return [widths[place] for widths, place in zip(choices, places, strict=True)]

    def _targets(self, keep: int) -> list[int]:
        """Widths before rounding."""
        budget = sum(item.units * item.width for item in self._candidates) - keep
        taken = np.searchsorted(self._taken, budget, side="right")
        removed = np.bincount(self._owner[:taken], minlength=len(self._candidates))
        return [item.width - int(count) for item, count in zip(self._candidates, removed, strict=True)]


def _choices(item: Candidate, multiple: int) -> list[int]:
    """Widths that ``item`` may have, ascending: the multiples of ``multiple``, and its full width."""
    first = -(-item.fewest // multiple) * multiple
    return [*range(first, item.width, multiple), item.width]


def _nearest(widths: list[int], target: int) -> int:
    return min(range(len(widths)), key=lambda place: abs(widths[place] - target))
