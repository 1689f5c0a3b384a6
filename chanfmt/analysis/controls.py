"""Channels to compare a selection with: as many channels, drawn at random or similar in LP. Pure numpy.

The control of every FFN, and of every expert, comes from its own channels.
"""

from __future__ import annotations

import numpy as np

from chanfmt.base.errors import UsageError
from chanfmt.format.unit import unit_rows


def random_control(selected: np.ndarray, pool: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """As many channels of ``pool`` as ``selected`` marks; masks are bool (channel,), or (expert, channel).

    Raises:
        UsageError: The pool has fewer channels.
    """
    selected, pool = np.asarray(selected), np.asarray(pool)
    control = np.zeros(selected.shape, dtype=bool)
    for chosen, free, drawn in zip(*map(unit_rows, (selected, pool, control)), strict=True):
        count, candidates = int(chosen.sum()), np.flatnonzero(free)
        _check_room(count, len(candidates))
        drawn[generator.choice(candidates, count, replace=False)] = True
    return control


def matched_control(selected: np.ndarray, pool: np.ndarray, lp: np.ndarray) -> np.ndarray:
    """One channel of ``pool`` for each channel that ``selected`` marks: the nearest in log LP that is still free.

    The selected channels choose in order, the largest LP first.

    Args:
        lp: LP of each channel, in the shape of the masks.

    Raises:
        UsageError: The pool has fewer channels.
    """
    selected, pool, lp = np.asarray(selected), np.asarray(pool), np.asarray(lp)
    control = np.zeros(selected.shape, dtype=bool)
    for chosen, free, values, drawn in zip(*map(unit_rows, (selected, pool, lp, control)), strict=True):
        wanted, candidates = np.flatnonzero(chosen), np.flatnonzero(free)
        _check_room(len(wanted), len(candidates))
        drawn[candidates[_nearest(_log(values[wanted]), _log(values[candidates]))]] = True
    return control


def _nearest(wanted: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """For each of ``wanted``, from the largest down, the position of the nearest of ``candidates`` that is still free."""
    order = np.argsort(candidates, kind="stable")
    values, end = candidates[order], len(candidates)
    # above[p] leads to the first free place from p on, and below[p] to the last free place before p.
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
    """Follow ``links`` from ``place`` to their end, and shorten the way for the next call. Returns the end."""
    end = place
    while links[end] != end:
        end = links[end]
    while links[place] != end:
        links[place], place = end, links[place]
    return end


def _log(lp: np.ndarray) -> np.ndarray:
    # A channel of LP 0 is farther from all other channels than these are from each other.
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(lp.astype(np.float64)), -1e3)


def _check_room(count: int, available: int) -> None:
    if count > available:
        raise UsageError(
            f"a selection of {count} channels has no control of its size: {available} others are left",
            hint="select fewer, or ask for no control",
        )
