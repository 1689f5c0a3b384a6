"""Offsets by which sequences are turned, so that what comes from chance alone can be measured."""

from __future__ import annotations

_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio, odd."""


def turn_offset(number: int, length: int, least: int) -> int:
    """Offset number ``number`` of a null that turns sequences of ``length`` tokens, from ``least`` to ``length - least``.

    The offsets are multiples of the golden ratio modulo 1, stretched to this range. They cover it evenly, however few they are,
    so that no difference between positions stays in the mean over the sequences. They need no seed and no generator: a build
    that goes on, or has another batch size, has the same offsets.

    >>> [turn_offset(number, 512, 1) for number in range(5)]
    [316, 121, 437, 242, 47]
    """
    fraction = (number + 1) * _GOLDEN % 2**64
    return least + fraction * (length - 2 * least + 1) // 2**64
