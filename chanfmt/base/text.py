"""Text that people and machines read: safe characters, numbers, tables, JSON. One function each, used everywhere."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def printable(text: str) -> str:
    """``text`` without terminal control characters: names in a file are not commands."""
    return "".join(
        character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def significant(value: float, digits: int = 4) -> str:
    """A number in at most ``digits`` significant digits, for a table's cell."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.{digits}g}"


def format_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """``rows`` under ``headings`` as text with columns two spaces apart."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max([len(heading), *(len(row[index]) for row in cells)]) for index, heading in enumerate(headings)]
    left = [
        bool(rows) and all(isinstance(row[index], str) and not _numeric(row[index]) for row in rows)
        for index in range(len(headings))
    ]

    def line(row: Sequence[str]) -> str:
        parts = [cell.ljust(width) if flush else cell.rjust(width) for cell, width, flush in zip(row, widths, left, strict=True)]
        return "  ".join(parts).rstrip()

    return "\n".join([line(headings), *(line(row) for row in cells)])


def json_text(value: Any) -> str:
    """``value`` as one JSON document that a terminal can show; numbers that are not finite become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    # JSON lets DEL and the C1 controls through; a terminal would obey them.
    return re.sub("[\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", text)


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
