"""Results on stdout. No command prints in another way, so that no text of a file looks like a line of the command."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
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


def print_table(headings: Sequence[str], rows: Sequence[Sequence[Any]], spare: Sequence[int] = ()) -> None:
    """Print ``rows`` under ``headings``: columns of text flush left, other columns flush right.

    Args:
        spare: Columns to leave out, in this order, while the table is wider than the terminal. A note names them.
    """
    left_out: list[int] = []
    for column in (*spare, None):
        kept = [place for place in range(len(headings)) if place not in left_out]
        text = format_table([headings[place] for place in kept], [[row[place] for place in kept] for row in rows])
        if column is None or max(map(cell_width, text.splitlines())) <= _columns():
            break
        left_out.append(column)
    print(text)
    if left_out:
        names = ", ".join(one_line(headings[place]) for place in sorted(left_out))
        say(f"note: left out to fit {_columns()} columns: {names}; --json prints everything")


def print_wrapped(text: str, indent: str) -> None:
    """Print ``text`` in lines that fit the terminal, all but the first behind ``indent``."""
    lines = textwrap.wrap(
        one_line(text), max(40, _columns()), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    for line in lines or [""]:
        print(line)


def _columns() -> int:
    """Width of the terminal; 80 if stdout is not a terminal, so that a page or a file looks alike everywhere."""
    return shutil.get_terminal_size().columns


def print_pairs(rows: Sequence[Sequence[str]]) -> None:
    """Print names and values, one pair in each line."""
    names = [one_line(name) for name, _ in rows]
    width = max(map(cell_width, names))
    for name, (_, value) in zip(names, rows, strict=True):
        print_line(f"{padded(name, width)}  {value}")
