"""One pool for all FFNs: budget, cap, protection, order, rounding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.planning.allocation import Candidate, Pool, ladder


@st.composite
def pools(draw: st.DrawFn) -> tuple[list[Candidate], int]:
    """FFNs with few distinct scores, so that ties are common, and a budget they can meet."""
    candidates = []
    for _ in range(draw(st.integers(1, 5))):
        width = draw(st.integers(2, 300))
        most = draw(st.integers(0, width - 1))
        scores = draw(st.lists(st.integers(0, 6), min_size=most, max_size=most))
        candidates.append(Candidate(width, draw(st.sampled_from([1, 1, 1, 4])), np.sort(np.array(scores, dtype=np.float64))))
    fewest = sum(item.units * item.fewest for item in candidates)
    return candidates, draw(st.integers(fewest, sum(item.units * item.width for item in candidates)))


@settings(max_examples=200, deadline=None)
@given(pools())
def test_without_rounding_the_lowest_scores_go(pool: tuple[list[Candidate], int]) -> None:
    candidates, keep = pool
    widths = Pool(candidates).widths(keep, 1)
    for item, width in zip(candidates, widths, strict=True):
        assert max(1, item.fewest) <= width <= item.width
    total = sum(item.units * width for item, width in zip(candidates, widths, strict=True))
    if all(item.units == 1 for item in candidates):
        assert total == keep
        # The slow way: channel by channel. If scores are equal, the last FFN's channel goes first.
        pool_of = sorted(
            (float(value), -index, rank) for index, item in enumerate(candidates) for rank, value in enumerate(item.ladder)
        )
        gone = [-index for _, index, _ in pool_of[: sum(item.width for item in candidates) - keep]]
        assert widths == [item.width - gone.count(index) for index, item in enumerate(candidates)]
    else:
        assert abs(total - keep) < max(item.units for item in candidates)


@settings(max_examples=200, deadline=None)
@given(pools(), st.sampled_from([2, 8]))
def test_rounding_keeps_bounds_multiples_and_the_total(pool: tuple[list[Candidate], int], multiple: int) -> None:
    candidates, keep = pool
    widths = Pool(candidates).widths(keep, multiple)
    excess = sum(item.units * width for item, width in zip(candidates, widths, strict=True)) - keep
    for item, width in zip(candidates, widths, strict=True):
        assert max(1, item.fewest) <= width <= item.width
        assert width % multiple == 0 or width == item.width
        # No other width of a single FFN would bring the total nearer to the budget.
        smaller = (width - 1) // multiple * multiple
        larger = min(width // multiple * multiple + multiple, item.width)
        if smaller >= max(1, item.fewest):
            assert abs(excess - item.units * (width - smaller)) >= abs(excess)
        assert larger == width or abs(excess + item.units * (larger - width)) >= abs(excess)


@settings(max_examples=100, deadline=None)
@given(pools())
def test_default_multiples_keep_bounds(pool: tuple[list[Candidate], int]) -> None:
    candidates, keep = pool
    for item, width in zip(candidates, Pool(candidates).widths(keep), strict=True):
        assert max(1, item.fewest) <= width <= item.width


def test_rounding_gives_the_total_back() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        candidates = [Candidate(1536, 1, np.sort(random.lognormal(0, 1 + layer / 4, 1075))) for layer in range(12)]
        widths = Pool(candidates).widths(12 * 768, 64)
        assert sum(widths) == 12 * 768
        assert all(width % 64 == 0 for width in widths)
        exact = Pool(candidates).widths(12 * 768, 1)
        assert max(abs(width - other) for width, other in zip(widths, exact, strict=True)) <= 64
        assert len(set(widths)) > 1


def test_default_multiples_move_no_width_far() -> None:
    random = np.random.default_rng(1)
    candidates = [Candidate(1536, 1, np.sort(random.lognormal(layer / 2, 1, 1075))) for layer in range(12)]
    widths, exact = Pool(candidates).widths(12 * 768), Pool(candidates).widths(12 * 768, 1)
    assert min(exact) == 461
    assert widths != exact
    assert abs(sum(widths) - 12 * 768) <= 16
    assert any(width % 32 == 0 for width in widths)
    for width, other in zip(widths, exact, strict=True):
        assert abs(width - other) <= 0.02 * other + 64


def test_more_must_stay_than_may() -> None:
    candidates = [Candidate(10, 1, np.zeros(3)), Candidate(10, 2, np.zeros(5))]
    assert Pool(candidates).widths(17, 1) == [7, 5]
    with pytest.raises(ValueError, match="more must stay"):
        Pool(candidates).widths(16, 1)


@pytest.mark.parametrize("experts", [1, 3])
def test_ladder_is_the_mean_of_every_experts_next(experts: int) -> None:
    random = np.random.default_rng(experts)
    scores = random.normal(0, 1, (experts, 9))
    protected = random.random((experts, 9)) < 0.3
    most = 9 - int(protected.sum(axis=1).max())
    expected = np.zeros(most)
    for row in range(experts):
        expected += np.array(sorted(value for value, fixed in zip(scores[row], protected[row], strict=True) if not fixed)[:most])
    np.testing.assert_allclose(ladder(scores, protected, most), expected / experts)
