"""Kept widths: floor, rounding, and the sparsities that mean nothing."""

from __future__ import annotations

import math

import pytest

from chanfmt.base.errors import UsageError
from surgery.planning.width import kept_width


@pytest.mark.parametrize(
    ("width", "sparsity", "multiple_of", "expected"),
    [
        (14336, 0.5, None, 7168),
        (1536, 0.5, None, 768),
        # 1536 - 460 = 1076: 256 would move it by 4.8%, 128 by 4.8%, 64 by 1.1%.
        (1536, 0.3, None, 1088),
        # If the width were rounded to 256, 128, 64 or 32, nothing would be cut.
        (512, 0.005, None, 510),
        (37, 0.5, None, 19),
        (100, 0.29, 1, 71),
        (100, 0.5, 32, 64),
        (96, 0.99, 32, 32),
        (96, 0.02, 32, 64),
        (37, 0.99, None, 1),
        (2, 0.5, None, 1),
    ],
)
def test_known_widths(width: int, sparsity: float, multiple_of: int | None, expected: int) -> None:
    assert kept_width(width, sparsity, multiple_of) == expected


def test_default_never_moves_the_target_by_two_percent() -> None:
    for width in (768, 1536, 3072, 11008, 14336, 37, 641):
        for percent in range(3, 100):
            target = width - min(width - 1, math.floor(percent * width / 100))
            kept = kept_width(width, percent / 100)
            assert 1 <= kept < width
            assert abs(kept - target) < 0.02 * target


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
