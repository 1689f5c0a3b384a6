"""Channels to compare a selection with: as many of them, drawn at random or alike in LP. Pure numpy.

Every FFN, and every expert, is matched with channels of its own.
"""

from __future__ import annotations

import numpy as np

from chanfmt.base.errors import UsageError
from chanfmt.format.unit import unit_rows


def random_control(selected: np.ndarray, pool: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """As many channels of ``pool`` as ``selected`` marks; masks are bool (channel,), or (expert, channel).

    Raises:
        UsageError: The pool has fewer.
    """
    control = np.zeros(selected.shape, dtype=bool)
    for chosen, free, drawn in zip(*map(unit_rows, (selected, pool, control)), strict=True):
        count, candidates = int(chosen.sum()), np.flatnonzero(free)
        _check_room(count, len(candidates))
        drawn[generator.choice(candidates, count, replace=False)] = True
    return control


def matched_control(selected: np.ndarray, pool: np.ndarray, lp: np.ndarray) -> np.ndarray:
    """A channel of ``pool`` for each that ``selected`` marks, the nearest in log LP that is left, largest LP first.

    Args:
        lp: LP of each channel, of the shape of the masks.

    Raises:
        UsageError: The pool has fewer channels.
    """
    control = np.zeros(selected.shape, dtype=bool)
    for chosen, free, values, drawn in zip(*map(unit_rows, (selected, pool, lp, control)), strict=True):
        wanted, candidates = np.flatnonzero(chosen), np.flatnonzero(free)
        _check_room(len(wanted), len(candidates))
        drawn[candidates[_nearest(_log(values[wanted]), _log(values[candidates]))]] = True
    return control


def _nearest(wanted: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Positions in ``candidates``, each once: for each of ``wanted``, from the largest down, the nearest that is left."""
    order = np.argsort(candidates, kind="stable")
    values, end = candidates[order], len(candidates)
    # above[p] leads to the first place from p on that is left, below[p] to the last one before p.
    above, below = list(range(end + 1)), list(range(end + 1))
    found = []
    for value in np.sort(wanted)[::-1]:
        place = int(np.searchsorted(values, value))
        high, low = _follow(above, place), _follow(below, place) - 1
        take_low = low >= 0 and (high == end or value - values[low] <= values[high] - value)
        taken = low if take_low else high
        above[taken], below[taken + 1] = taken + 1, taken
        found.append(order[taken])
    return np.array(found, dtype=np.intp)


def _follow(links: list[int], place: int) -> int:
    """Where ``links`` lead from ``place``; the way is shortened for the next time."""
    end = place
    while links[end] != end:
        end = links[end]
    while links[place] != end:
        links[place], place = end, links[place]
    return end


def _log(lp: np.ndarray) -> np.ndarray:
    # A channel of LP 0 is farther from all others than they are from each other.
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(lp.astype(np.float64)), -1e3)


def _check_room(count: int, available: int) -> None:
    if count > available:
        raise UsageError(
            f"a selection of {count} channels has no control of its size: {available} others are left",
            hint="select fewer, or ask for no control",
        )
