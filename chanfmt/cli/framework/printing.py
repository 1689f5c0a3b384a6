"""Results on stdout. No command prints in another way, so that no text of a file looks like a line of the command."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from chanfmt.base.text import LONGEST_LINE, cell_width, format_table, json_text, one_line, padded

if TYPE_CHECKING:
    from collections.abc import Sequence


def print_json(value: Any) -> None:
    """Print ``value`` as one JSON document; numbers that are not finite become null."""
    text = json_text(value)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json_text(value, ascii_only=True)
    print(text)


def print_line(text: str = "", longest: int = LONGEST_LINE) -> None:
    """Print ``text`` as one line of at most ``longest`` characters."""
    print(one_line(text, longest))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print ``rows`` under ``headings``: columns of text flush left, other columns flush right."""
    print(format_table(headings, rows))


def print_pairs(rows: Sequence[Sequence[str]]) -> None:
    """Print names and values, one pair in each line."""
    names = [one_line(name) for name, _ in rows]
    width = max(map(cell_width, names))
    for name, (_, value) in zip(names, rows, strict=True):
        print_line(f"{padded(name, width)}  {value}")
