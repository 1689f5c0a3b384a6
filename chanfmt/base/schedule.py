"""When long work is saved, such that saving takes a small share of the time."""

from __future__ import annotations

FIRST_SECONDS = 30.0
"""Nothing is saved before that: a shorter run is sooner repeated than continued."""
SHARE = 0.02
"""Largest share of the time that saving takes."""
BYTES_PER_SECOND = 40e6
"""Assumed speed of the first save, a low estimate. The time of each save is the estimate for the next."""


class Schedule:
    """When the next save is due: as often as keeps saving below `SHARE` of the time.

    Args:
        every: Seconds between two saves, in place of that rule; 0: always, infinity: never.
        now: Seconds of a monotonic clock at the start of the work.
    """

    def __init__(self, every: float | None, now: float) -> None:
        self._every = every
        self._last = now
        self._seconds_per_byte = 1 / BYTES_PER_SECOND
        self._wait = FIRST_SECONDS

    def due(self, now: float, nbytes: int) -> bool:
        """Whether ``nbytes`` should be saved at ``now`` (seconds of a monotonic clock)."""
        if self._every is not None:
            return now - self._last >= self._every
        return now - self._last >= max(self._wait, nbytes * self._seconds_per_byte / SHARE)

    def tried(self, start: float, stop: float, nbytes: int) -> None:
        """Take note that ``nbytes`` were saved, or could not be saved, from ``start`` to ``stop``."""
        self._last = stop
        self._wait = (stop - start) / SHARE
        self._seconds_per_byte = (stop - start) / max(1, nbytes)
