"""Number of channels that an FFN keeps."""

from __future__ import annotations

import math
from numbers import Real

from chanfmt.base.errors import UsageError

PREFERRED_MULTIPLES = (256, 128, 64, 32, 1)
"""Multiples that suit matrix hardware, best first."""
MAX_SHIFT = 0.02
"""Largest relative change of the kept width that rounding to a default multiple may cause."""


def kept_width(width: int, sparsity: float, multiple_of: int | None = None) -> int:
    """Channels that remain of ``width`` at ``sparsity``, between 1 and ``width - 1``.

    The target ``width - floor(sparsity * width)`` is rounded to the nearest multiple of ``multiple_of`` (up if it lies half
    way). The default multiple is the largest of `PREFERRED_MULTIPLES` that divides ``width`` and changes the target by
    less than `MAX_SHIFT`.

    Raises:
        UsageError: ``sparsity`` lies outside (0, 1) or removes no channel, or no multiple fits.
    """
    check_sparsity(sparsity)
    # The relative slack keeps 0.29 * 100 from flooring to 28.
    target = width - min(width - 1, math.floor(sparsity * width * (1 + 1e-12)))
    if target == width:
        raise UsageError(f"a sparsity of {sparsity:g} removes none of {width} channels", hint="raise --sparsity")
    if multiple_of is None:
        multiple_of = preferred_multiple(width, target)
    if multiple_of < 1:
        raise UsageError(f"--multiple-of must be at least 1, not {multiple_of}")
    if multiple_of >= width:
        raise UsageError(f"no multiple of {multiple_of} is a width below {width}", hint="lower --multiple-of")
    largest = (width - 1) // multiple_of * multiple_of
    return min(max(nearest_multiple(target, multiple_of), multiple_of), largest)


def preferred_multiple(width: int, target: int) -> int:
    """The largest of `PREFERRED_MULTIPLES` that divides ``width`` and changes ``target`` by less than `MAX_SHIFT`."""
    return next(multiple for multiple in PREFERRED_MULTIPLES if _suits(multiple, width, target))


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


def _suits(multiple: int, width: int, target: int) -> bool:
    rounded = nearest_multiple(target, multiple)
    # Rounding must not turn a cut into no cut.
    return width % multiple == 0 and (rounded < width or target == width) and abs(rounded - target) < MAX_SHIFT * target
