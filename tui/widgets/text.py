"""Numbers as short text, and text in cells of the terminal. Chinese, Japanese and Korean characters take two cells."""

from __future__ import annotations

import math

from rich.cells import cell_len, chop_cells, set_cell_size

EIGHTHS = " ▏▎▍▌▋▊▉█"


def number(value: float, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits and a short exponent; ``-`` for NaN."""
    if math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    mantissa, mark, exponent = f"{value:#.{digits}g}".partition("e")
    mantissa = mantissa.rstrip(".")
    return f"{mantissa}e{int(exponent)}" if mark else mantissa


def whole_or(value: float, dtype: str, digits: int = 3) -> str:
    """``value`` of a metric of type ``dtype``: ids and counts whole, because people type them back; the rest as `number`."""
    return str(int(value)) if dtype[0] in "iu" and value == value else number(value, digits)


def percent(value: float, decimals: int = 1) -> str:
    """A share as a percentage; ``-`` for NaN."""
    return "-" if math.isnan(value) else f"{100 * value:.{decimals}f}%"


def count(value: float) -> str:
    """A count with thousands separators, and with one decimal below ten; ``-`` for NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:.1f}" if value < 9.95 and value != int(value) else f"{value:,.0f}"


def bar(share: float, width: int) -> str:
    """A bar that fills ``share`` of ``width`` cells, in eighths of a cell, padded to ``width``; blank for NaN."""
    if math.isnan(share):
        return " " * width
    eighths = round(8 * width * min(max(share, 0.0), 1.0))
    full, rest = divmod(eighths, 8)
    return ("█" * full + (EIGHTHS[rest] if rest else "")).ljust(width)


def left(text: str, width: int) -> str:
    """``text`` in exactly ``width`` cells, at the left; what does not fit is cut."""
    return set_cell_size(text, width)


def last_cells(text: str, width: int) -> str:
    """The end of ``text`` in exactly ``width`` cells; what does not fit is cut at the left."""
    kept, cells = "", 0
    for character in reversed(text):
        cells += cell_len(character)
        if cells > width:
            break
        kept = character + kept
    return right(kept, width)


def right(text: str, width: int) -> str:
    """``text`` in ``width`` cells, at the right; a longer text stays whole."""
    return " " * (width - cell_len(text)) + text


def spread(start: str, end: str, width: int) -> str:
    """``start`` and ``end`` at the ends of a line of ``width`` cells; ``start`` is cut first."""
    if not end:
        return set_cell_size(start, min(width, cell_len(start)))
    room = max(0, width - cell_len(end) - 1)
    line = f"{left(start, room)} {end}"
    return line if cell_len(line) <= width else left(line, width)


def wrapped(text: str, width: int) -> list[str]:
    """``text`` as lines of at most ``width`` cells, broken at spaces; a longer word is broken at any character."""
    lines = [""]
    for word in text.split():
        if lines[-1] and cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines += chop_cells(word, max(2, width))
    return lines[1:]
