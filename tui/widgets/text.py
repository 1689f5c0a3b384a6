"""Numbers as short text for table cells."""

from __future__ import annotations

import math

EIGHTHS = " ▏▎▍▌▋▊▉█"


def number(value: float, digits: int = 3) -> str:
    """``digits`` significant digits, short exponents, ``-`` for NaN."""
    if math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    mantissa, mark, exponent = f"{value:#.{digits}g}".partition("e")
    mantissa = mantissa.rstrip(".")
    return f"{mantissa}e{int(exponent)}" if mark else mantissa


def percent(value: float, decimals: int = 1) -> str:
    """A share as percent, ``-`` for NaN."""
    return "-" if math.isnan(value) else f"{100 * value:.{decimals}f}%"


def count(value: float) -> str:
    """A count with thousands separated, one decimal below ten, ``-`` for NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:.1f}" if value < 9.95 and value != int(value) else f"{value:,.0f}"


def bar(share: float, width: int) -> str:
    """``share`` of ``width`` cells as a bar in eighths, padded to ``width``; blank for NaN."""
    if math.isnan(share):
        return " " * width
    eighths = round(8 * width * min(max(share, 0.0), 1.0))
    full, rest = divmod(eighths, 8)
    return ("█" * full + (EIGHTHS[rest] if rest else "")).ljust(width)


def spread(left: str, right: str, width: int) -> str:
    """``left`` and ``right`` at the ends of a line of ``width`` cells; ``left`` is cut first."""
    if not right:
        return left[:width]
    room = max(0, width - len(right) - 1)
    return f"{left[:room]:<{room}} {right}"[:width]
