"""Text that people and machines read: safe lines, numbers, tables, JSON, cells of spreadsheets.

Markdown is in `chanfmt.base.markdown`, HTML in `chanfmt.base.html`.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""Characters that make a spreadsheet run a cell as a formula if the cell begins with one of them."""


LONGEST_LINE = 1000
"""Characters of a line that people read."""
LONGEST_CELL = 200
"""Characters of a table's cell."""
_OMITTED = "..."
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    """``text`` as one line that is safe to show: the only way for a text of unknown origin to a terminal or into markup.

    Newlines become spaces, and other characters that a terminal obeys become U+FFFD, so the text cannot look like a line of
    its own. The middle of a text of more than ``longest`` characters is left out: the end of an error says what is wrong.
    """
    if len(text) > longest:
        room = max(0, longest - len(_OMITTED))
        text = text[: room - room // 2] + _OMITTED + text[len(text) - room // 2 :]
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else " " if character == "\n" else "\N{REPLACEMENT CHARACTER}"
        for character in text.replace("\r\n", "\n")
    )


def beginning(text: str, longest: int) -> str:
    """The first ``longest`` characters of ``text``, with single spaces in place of newlines and other spaces."""
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[:longest]}{_OMITTED}"


def distinct_lines(texts: Iterable[str]) -> dict[str, str]:
    """Each of ``texts`` to its `one_line`. Different texts that would look alike get a number: ``name``, ``name (2)``.

    The numbers do not depend on the order of ``texts``.
    """
    lines = {text: one_line(text) for text in texts}
    taken = set(lines.values())
    named = set()
    # A text that is safe as it is comes first, and keeps its name.
    for text in sorted(lines, key=lambda text: (text != lines[text], text)):
        line, number = lines[text], 2
        if line in named:
            while f"{line} ({number})" in taken:
                number += 1
            lines[text] = f"{line} ({number})"
        named.add(line)
        taken.add(lines[text])
    return lines


def significant(value: float, digits: int = 4) -> str:
    """``value`` in at most ``digits`` significant digits, for a cell of a table; ``-`` for NaN and None."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.{digits}g}"


def number(value: float) -> str:
    """A count with separators, any other number in four significant digits. Not for numbers that people type back."""
    return f"{value:,}" if isinstance(value, int) else significant(value)


def percentage(share: float, decimals: int = 1) -> str:
    """``share`` in percent; ``-`` for NaN."""
    return "-" if math.isnan(share) else f"{share:.{decimals}%}"


def gigabytes(nbytes: int) -> str:
    """``nbytes`` as a person reads them: 3.1 GB, 11 GB, 40 MB."""
    if nbytes < 1e9:
        return f"{nbytes / 1e6:.0f} MB"
    return f"{nbytes / 1e9:.1f} GB" if nbytes < 1e10 else f"{nbytes / 1e9:.0f} GB"


def span(low: str, high: str) -> str:
    """``LOW to HIGH``, or one of them if they are alike."""
    return low if low == high else f"{low} to {high}"


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
    headings = [one_line(heading, LONGEST_CELL) for heading in headings]
    cells = [[one_line(str(cell), LONGEST_CELL) for cell in row] for row in rows]
    widths = [max(map(cell_width, (heading, *(row[index] for row in cells)))) for index, heading in enumerate(headings)]
    right = [
        not rows or not all(isinstance(row[index], str) and not _numeric(row[index]) for row in rows)
        for index in range(len(headings))
    ]

    def line(row: Sequence[str]) -> str:
        parts = [padded(cell, width, right=flush) for cell, width, flush in zip(row, widths, right, strict=True)]
        return "  ".join(parts).rstrip()

    return "\n".join([line(headings), *(line(row) for row in cells)])


def json_text(value: Any, *, ascii_only: bool = False) -> str:
    """``value`` as one JSON document that is safe to show in a terminal; numbers that are not finite become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=ascii_only, allow_nan=False)
    # JSON lets through DEL and the C1 controls, which a terminal would obey, marks that turn the direction of what follows,
    # and halves of surrogate pairs, which no encoding has.
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


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
