"""When long work is saved."""

from __future__ import annotations

import math

import pytest

from chanfmt.base.schedule import SHARE, Schedule


@pytest.mark.parametrize(("every", "seconds", "rate"), [(None, 20_000, 50e6), (None, 20_000, 1e9), (500.0, 20_000, 50e6)])
def test_saving_takes_at_most_two_percent_of_the_time(every, seconds, rate):
    """Simulate a run with batches of 3 s and a state that grows from 0.1 to 4 GB after the warm-up."""
    now, spent, count = 0.0, 0.0, 0
    schedule = Schedule(every, now)
    while now < seconds:
        now += 3
        nbytes = 4_000_000_000 if now > 1000 else 100_000_000
        if schedule.due(now, nbytes):
            took = nbytes / rate
            schedule.tried(now, now + took, nbytes)
            now, spent, count = now + took, spent + took, count + 1
            assert every is not None or spent <= SHARE * now
    assert count >= 5
    short = Schedule(None, 0.0)
    assert not any(short.due(now, 1000) for now in range(30))


def test_always_or_never():
    assert Schedule(0, 5.0).due(5.0, 10**12)
    assert not Schedule(math.inf, 5.0).due(1e9, 1)
