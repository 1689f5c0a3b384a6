"""Results on stdout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.text import format_table, json_text, printable

if TYPE_CHECKING:
    from collections.abc import Sequence


def print_json(value: Any) -> None:
    """Print ``value`` as one JSON document; numbers that are not finite become null."""
    print(json_text(value))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print ``rows`` under ``headings``: columns of text flush left, other columns flush right."""
    print(format_table(headings, rows))


def print_pairs(rows: Sequence[Sequence[str]]) -> None:
    """Print names and values, one pair in each line."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(printable(f"{name.ljust(width)}  {value}"))
