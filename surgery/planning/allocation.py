"""How many channels each FFN keeps when all of them share one pool. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from surgery.planning.width import nearest_multiple, preferred_multiple

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, eq=False)
class Candidate:
    """An FFN in the pool.

    Attributes:
        width: Its channels, of each expert where it has experts.
        units: Its experts, or 1: so many channels go at once.
        ladder: Score of its first removal, of its second, ...; ascending, and only as long as it may be cut,
            which is shorter than its width.
    """

    width: int
    units: int
    ladder: np.ndarray

    @property
    def fewest(self) -> int:
        """Channels it keeps at least."""
        return self.width - len(self.ladder)


def ladder(scores: np.ndarray, protected: np.ndarray, most: int) -> np.ndarray:
    """What each removal costs an FFN, ascending.

    All experts keep the same count, so the k-th removal takes the k-th lowest unprotected channel of each,
    and its score is their mean.

    Args:
        scores, protected: (expert, channels), or one row for a dense FFN.
        most: Removals that are allowed; no row may protect so many that fewer are possible.
    """
    return np.sort(np.where(protected, np.inf, scores), axis=-1)[:, :most].mean(axis=0)


class Pool:
    """FFNs that share one number of kept channels. What does not depend on that number is computed once.

    Removals are taken from the pool in the order of their scores; of equal ones, those of the last FFN first.
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
        """Kept widths, so that ``keep`` channels stay in all, or as near to it as multiples allow.

        Each width is rounded like a uniform one is, and the roundings that moved a width least for what they
        give are turned until the total is right.

        Raises:
            ValueError: More than ``keep`` must stay.
        """
        candidates = self._candidates
        if sum(item.units * item.fewest for item in candidates) > keep:
            raise ValueError("more must stay than may")
        targets = self._targets(keep)
        steps = [multiple_of or preferred_multiple(item.width, target) for item, target in zip(candidates, targets, strict=True)]
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
    """Widths that ``item`` may have, ascending: multiples, and all of it."""
    first = -(-item.fewest // multiple) * multiple
    return [*range(first, item.width, multiple), item.width]


def _nearest(widths: list[int], target: int) -> int:
    return min(range(len(widths)), key=lambda place: abs(widths[place] - target))
