"""HTML from names and numbers that come from files: such text must not start markup of its own."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from chanfmt.base.text import one_line

if TYPE_CHECKING:
    from collections.abc import Sequence


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """``rows`` under ``headings``, if there are any, as an HTML table."""
    head = f"<tr>{''.join(f'<th>{inline(cell)}</th>' for cell in headings)}</tr>\n" if headings else ""
    body = "\n".join(f"<tr>{''.join(f'<td>{inline(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>\n{head}{body}\n</table>"


def inline(text: str) -> str:
    """``text`` for the content or an attribute of an HTML element."""
    return escape(one_line(text))
