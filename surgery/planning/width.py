"""Number of channels that an FFN keeps, and that FFNs keep together if one config field sets their widths."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING

from chanfmt.base.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

PREFERRED_MULTIPLES = (256, 128, 64)
"""Multiples of kept widths that suit hardware best, best first."""
LEAST_MULTIPLE = 32
"""Multiple of every kept width: the block of llama.cpp's quantised types, and the tile of most matrix hardware."""
MAX_SHIFT = 0.02
"""Largest relative change of the kept width that rounding to one of `PREFERRED_MULTIPLES` may cause."""
_TINY_STEPS = 8
"""Fewest steps that a width below ``2 * LEAST_MULTIPLE`` is divided into."""


def kept_width(width: int, sparsity: float, multiple_of: int | None = None) -> int:
    """Channels that remain of ``width`` at ``sparsity``, between 1 and ``width - 1``.

    The target ``width - floor(sparsity * width)`` is rounded to the nearest multiple of ``multiple_of`` (up if it lies half
    way). The default multiple is the largest of `PREFERRED_MULTIPLES` that changes the target by less than `MAX_SHIFT`, and
    `LEAST_MULTIPLE` otherwise, whatever divides ``width``. A width below ``2 * LEAST_MULTIPLE`` has no multiple of
    `LEAST_MULTIPLE` at or below its half. Its default multiple is the largest power of two that goes at least 8 times into the
    width, so that a cut of a tiny model is near what was asked.

    Raises:
        UsageError: ``sparsity`` lies outside (0, 1) or removes no channel, or no multiple fits.
    """
    return kept_units(width, (1,), sparsity, multiple_of)


def kept_units(units: int, factors: Sequence[int], sparsity: float, multiple_of: int | None = None) -> int:
    """What remains of the integer ``units`` that several widths share: each width is one of ``factors`` times it.

    The narrowest of the widths is rounded as by `kept_width`, to a multiple for which all widths are multiples.

    Raises:
        UsageError: As `kept_width`.
    """
    check_sparsity(sparsity)
    least = min(factors)
    width = units * least
    # The relative slack keeps 0.29 * 100 from flooring to 28.
    target = width - min(width - 1, math.floor(sparsity * width * (1 + 1e-12)))
    if target == width:
        raise UsageError(f"a sparsity of {sparsity:g} removes none of {width} channels", hint="raise --sparsity")
    if multiple_of is None:
        multiple_of = default_multiple(width, target, factors)
    if multiple_of < 1:
        raise UsageError(f"--multiple-of must be at least 1, not {multiple_of}")
    step = least * unit_step(factors, multiple_of)
    if step >= width:
        also = "" if step == multiple_of else f" (and of the {step} channels that its config field can change it by)"
        raise UsageError(f"no multiple of {multiple_of}{also} is a width below {width}", hint="lower --multiple-of")
    largest = (width - 1) // step * step
    return min(max(nearest_multiple(target, step), step), largest) // least


def default_multiple(width: int, target: int, factors: Sequence[int] = (1,)) -> int:
    """The multiple that `kept_width` rounds ``target`` to, of ``width`` channels, if none is asked for."""
    least = min(factors)
    for multiple in PREFERRED_MULTIPLES:
        rounded = nearest_multiple(target, least * unit_step(factors, multiple))
        # Rounding must not turn a cut into no cut.
        if 0 < rounded < width and abs(rounded - target) < MAX_SHIFT * target:
            return multiple
    return least_multiple(width, factors)


def least_multiple(width: int, factors: Sequence[int] = (1,)) -> int:
    """`LEAST_MULTIPLE`, or a smaller power of two if ``width``, the narrowest of linked widths, is tiny."""
    least = min(factors)
    if 2 * least * unit_step(factors, LEAST_MULTIPLE) <= width:
        return LEAST_MULTIPLE
    multiple = LEAST_MULTIPLE // 2
    while multiple > 1 and _TINY_STEPS * least * unit_step(factors, multiple) > width:
        multiple //= 2
    return multiple


def unit_step(factors: Sequence[int], multiple: int) -> int:
    """The smallest step of a shared integer for which each of ``factors`` times it is a multiple of ``multiple``."""
    return math.lcm(*(multiple // math.gcd(multiple, factor) for factor in factors))


def nearest_multiple(target: int, multiple: int) -> int:
    """The multiple of ``multiple`` nearest to ``target``; the higher one if ``target`` lies half way."""
    return (2 * target + multiple) // (2 * multiple) * multiple


def check_sparsity(sparsity: float) -> None:
    """Raise `UsageError` unless ``sparsity`` is a number between 0 and 1."""
    if not isinstance(sparsity, Real):
        raise UsageError(f"--sparsity must be a number between 0 and 1, not {sparsity!r}")
    if 0 < sparsity < 1:
        return
    reason = "it is a share of the channels"
    if sparsity == 0:
        reason = "nothing would be cut"
    elif sparsity == 1:
        reason = "nothing would be left"
    hint = f"write {sparsity / 100:g} for {sparsity:g}%" if 1 < sparsity < 100 else None
    raise UsageError(f"--sparsity must lie between 0 and 1, not {sparsity:g}: {reason}", hint=hint)
