"""Lists of numbers in the spelling of the options: ``0.1:0.7:0.1``, ``0.3,0.5``, ``0-2,7``."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

from chanfmt.base.errors import UsageError
from surgery.planning.addresses import parse_ranges

_MOST = 1000


def parse_shares(text: str, flag: str) -> tuple[float, ...]:
    """Numbers from 0 to 1: ``FIRST:LAST:STEP``, ends included, or numbers separated by commas. Each number comes once.

    Raises:
        UsageError: ``text`` is neither, or a number lies outside 0 to 1.
    """
    try:
        numbers = [Decimal(item.strip()) for item in text.split(":" if ":" in text else ",")]
    except InvalidOperation:
        numbers = []
    if not numbers or (":" in text and len(numbers) != 3) or not all(number.is_finite() for number in numbers):
        raise UsageError(f"{flag} {text!r} is not a list of numbers", hint="write it as in 0.1:0.7:0.1 or 0.3,0.5")
    if ":" in text:
        first, last, step = numbers
        if step <= 0 or last < first:
            raise UsageError(
                f"{flag} {text!r} holds no number: LAST lies before FIRST, or STEP is not positive",
                hint="write FIRST:LAST:STEP, as in 0.1:0.7:0.1",
            )
        if (last - first) / step >= _MOST:
            raise UsageError(f"{flag} {text!r} has more than {_MOST} values")
        # In decimals, 0.1:0.7:0.1 contains 0.3 and ends with 0.7.
        numbers = [first + step * count for count in range(int((last - first) / step) + 1)]
    for number in numbers:
        if not 0 <= number <= 1:
            hint = f"write {number / 100} for {number}%" if 1 < number <= 100 else None
            raise UsageError(f"{flag}: {number} is not a share from 0 to 1", hint=hint)
    return tuple(dict.fromkeys(float(number) for number in numbers))


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds such as ``0,1,2`` or ``0-2,7``, each once. Raises `UsageError` for anything else."""
    ranges = parse_ranges(text, "a seed")
    if sum(last - first + 1 for first, last in ranges) > _MOST:
        raise UsageError(f"--seeds {text!r} has more than {_MOST} values")
    return tuple(dict.fromkeys(seed for first, last in ranges for seed in range(first, last + 1)))


def parse_names(text: str) -> tuple[str, ...]:
    """Names separated by commas, each once."""
    return tuple(dict.fromkeys(name for item in text.split(",") if (name := item.strip())))
