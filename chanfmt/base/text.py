"""Text that people and machines read: safe characters, numbers, tables, JSON, cells of spreadsheets.

Markdown is in `chanfmt.base.markdown`, HTML in `chanfmt.base.html`.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""Characters that make a spreadsheet run a cell as a formula if the cell begins with one of them."""


def printable(text: str) -> str:
    """Replace the characters of ``text`` that a terminal obeys: names in a file are not commands. Newlines stay."""
    return "".join(
        character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def significant(value: float, digits: int = 4) -> str:
    """``value`` in at most ``digits`` significant digits, for a cell of a table; ``-`` for NaN and None."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.{digits}g}"


def number(value: float) -> str:
    """A count with separators, any other number in four significant digits. Not for numbers that people type back."""
    return f"{value:,}" if isinstance(value, int) else significant(value)


def cell_width(text: str) -> int:
    """Cells that ``text`` takes in a terminal: two for a CJK character, none for a combining one."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def padded(text: str, width: int, *, right: bool = False) -> str:
    """``text`` with spaces behind it, or before it if ``right``, until it is ``width`` cells wide."""
    spaces = " " * (width - cell_width(text))
    return spaces + text if right else text + spaces


def format_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """``rows`` under ``headings``, in columns two spaces apart: text flush left, numbers flush right."""
    cells = [[printable(str(cell)).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(cell_width, (heading, *(row[index] for row in cells)))) for index, heading in enumerate(headings)]
    right = [
        not rows or not all(isinstance(row[index], str) and not _numeric(row[index]) for row in rows)
        for index in range(len(headings))
    ]

    def line(row: Sequence[str]) -> str:
        parts = [padded(cell, width, right=flush) for cell, width, flush in zip(row, widths, right, strict=True)]
        return "  ".join(parts).rstrip()

    return "\n".join([line(headings), *(line(row) for row in cells)])


def json_text(value: Any) -> str:
    """``value`` as one JSON document that is safe to show in a terminal; numbers that are not finite become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    # JSON lets DEL and the C1 controls through, and a terminal would obey them.
    return re.sub("[\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", text)


def spreadsheet_text(text: str) -> str:
    """``text`` for a cell of a CSV file, with a quote before it if a spreadsheet would run it as a formula.

    Numbers must not pass through here: a negative number is not a formula.
    """
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def _numeric(text: str) -> bool:
    return text[:1].isdigit() or text[:1] in "+-" or text == "-"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def perplexity_text(perplexity: float | None) -> str:
    """A perplexity for a table's cell; None stands for a perplexity beyond float64."""
    if perplexity is None:
        return "inf"
    return f"{perplexity:,.2f}" if perplexity < 1e6 else f"{perplexity:.2e}"
