"""The number of calibration sequences that each source gives, from the values of ``--calib``."""

from __future__ import annotations

import math
from pathlib import PurePath
from typing import TYPE_CHECKING

from chanfmt.base.errors import UsageError
from chanfmt.data.text import ARRAYS, FILES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def read_weights(calib: Sequence[str], flag: str = "--calib") -> dict[str, float]:
    """Source to weight, from texts ``SOURCE`` or ``SOURCE=WEIGHT``. The weight is 1 if none is given.

    Args:
        calib: The texts.
        flag: The option that they come from, for errors.

    Raises:
        UsageError: There is no source, a source is named twice, or a weight is not a positive number.
    """
    weights: dict[str, float] = {}
    for text in calib:
        source, mark, weight = text.rpartition("=")
        # The name of a file may contain the mark.
        if not mark or PurePath(text).suffix in (*FILES, *ARRAYS):
            source, weight = text, "1"
        if not source:
            raise UsageError(f"{flag} {text!r} names no source")
        if source in weights:
            raise UsageError(f"{flag} names {source} twice", hint=f"give it a weight: {flag} {source}=2")
        try:
            weights[source] = float(weight)
        except ValueError:
            raise UsageError(f"{flag} {text}: the weight {weight!r} is not a number") from None
        if not 0 < weights[source] < math.inf:
            raise UsageError(f"{flag} {text}: a weight must be a positive number")
    if not weights:
        raise UsageError(f"{flag} names no source")
    return weights


def divide(weights: Mapping[str, float], sequences: int) -> dict[str, int]:
    """Divide ``sequences`` in proportion to ``weights``, by largest remainders, whatever the order of the sources.

    Raises:
        UsageError: A source would get no sequence.
    """
    largest = max(weights.values())
    total = math.fsum(weight / largest for weight in weights.values())
    exact = {source: weights[source] / largest / total * sequences for source in sorted(weights)}
    counts = {source: math.floor(value) for source, value in exact.items()}
    remainders = sorted(exact, key=lambda source: counts[source] - exact[source])
    for source in remainders[: sequences - sum(counts.values())]:
        counts[source] += 1
    for source, count in counts.items():
        if not count:
            raise UsageError(
                f"--sequences {sequences} leaves no sequence for {source}",
                hint="use more --sequences, or give it a larger weight",
            )
    return counts
