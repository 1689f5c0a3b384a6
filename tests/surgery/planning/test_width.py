"""Kept widths: floor, rounding, and the sparsities that mean nothing."""

from __future__ import annotations

import math

import pytest

from chanfmt.base.errors import UsageError
from surgery.planning.width import kept_units, kept_width

REAL = (704, 768, 1408, 1536, 2560, 3072, 4864, 5461, 8960, 11008, 14336, 18944, 27648, 1009, 7919)
"""FFN widths of released models, and two primes."""
LINKED = ((1408, (1, 2)), (1536, (1, 2)), (2048, (1, 4)), (96, (1, 2, 4, 8)), (768, (2,)), (128, (3, 5)))
"""Shared integers with the factors of the widths that a config field sets by them."""
PERCENT = range(5, 96)


@pytest.mark.parametrize(
    ("width", "sparsity", "multiple_of", "expected"),
    [
        (14336, 0.5, None, 7168),
        (1536, 0.5, None, 768),
        # 1536 - 460 = 1076: 256 would move it by 4.8%, 128 by 4.8%, 64 by 1.1%.
        (1536, 0.3, None, 1088),
        # 1408 - 844 = 564: 64 would move it by 2.1%, so 32 decides although it moves it as far.
        (1408, 0.6, None, 576),
        # A prime is cut to a multiple of 32 as well.
        (5461, 0.5, None, 2688),
        (1009, 0.5, None, 512),
        # The nearest multiple of 32 would cut nothing.
        (512, 0.005, None, 480),
        (96, 0.5, None, 64),
        (64, 0.9, None, 32),
        # Below 64 there is no multiple of 32 to choose from: the largest power of two that fits in 8 times.
        (63, 0.5, None, 32),
        (37, 0.5, None, 20),
        (37, 0.99, None, 4),
        (16, 0.5, None, 8),
        (2, 0.5, None, 1),
        (512, 0.005, 1, 510),
        (100, 0.29, 1, 71),
        (100, 0.5, 32, 64),
        (96, 0.99, 32, 32),
        (96, 0.02, 32, 64),
    ],
)
def test_known_widths(width: int, sparsity: float, multiple_of: int | None, expected: int) -> None:
    assert kept_width(width, sparsity, multiple_of) == expected


def test_default_widths_are_those_that_hardware_takes() -> None:
    """Multiples of 32 always, and of 128 or 256 where these are within 2% of what was asked."""
    for width in REAL:
        earlier = width
        for percent in PERCENT:
            kept = kept_width(width, percent / 100)
            target = width - math.floor(width * percent / 100)
            assert 0 < kept < width
            assert kept % 32 == 0
            assert kept <= earlier, "a higher sparsity keeps no more"
            earlier = kept
            for multiple in (256, 128):
                nearest = round(target / multiple) * multiple
                if 0 < nearest < width and abs(nearest - target) < 0.02 * target:
                    assert kept % multiple == 0
                    break
            assert abs(kept - target) <= max(32, 0.02 * target)


@pytest.mark.parametrize(("units", "factors"), LINKED)
def test_linked_widths_are_rounded_together(units: int, factors: tuple[int, ...]) -> None:
    earlier = units
    for percent in PERCENT:
        left = kept_units(units, factors, percent / 100)
        assert 0 < left <= earlier <= units
        assert left < units
        earlier = left
        assert all(factor * left % 32 == 0 for factor in factors)
        # One step of the field moves the widest by more than 32.
        step = math.lcm(*(32 // math.gcd(32, factor) for factor in factors))
        assert abs(left - units * (1 - percent / 100)) <= max(step, 0.02 * units) + 1


def test_a_field_that_moves_widths_in_large_steps() -> None:
    """An integer ratio of 4 with 64 dimensions has widths of 256, 192, 128 and 64."""
    assert [kept_units(4, (64,), percent / 100) for percent in (10, 30, 50, 90)] == [3, 3, 2, 1]
    with pytest.raises(UsageError, match=r"no multiple of 1 .*64 channels.* below 64"):
        kept_units(1, (64,), 0.5)


@pytest.mark.parametrize(
    ("sparsity", "reason"),
    [
        (0.0, "nothing would be cut"),
        (1.0, "nothing would be left"),
        (1.5, "a share"),
        (-0.1, "a share"),
        (50.0, "a share"),
        (float("nan"), "a share"),
        (float("inf"), "a share"),
    ],
)
def test_sparsities_without_meaning(sparsity: float, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        kept_width(96, sparsity)


def test_percent_is_explained() -> None:
    with pytest.raises(UsageError) as caught:
        kept_width(96, 50)
    assert caught.value.hint == "write 0.5 for 50%"


@pytest.mark.parametrize("multiple_of", [0, -8, 96, 128])
def test_multiples_that_do_not_fit(multiple_of: int) -> None:
    with pytest.raises(UsageError, match="multiple"):
        kept_width(96, 0.5, multiple_of)


def test_a_cut_of_nothing() -> None:
    with pytest.raises(UsageError, match="removes none of 37"):
        kept_width(37, 0.01)
