"""Tables for notebooks."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from chanfmt.base.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence


def html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """``rows`` under ``headings`` as an HTML table. Every cell is escaped."""
    head = "".join(f"<th>{_cell(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    return escape(printable(text))
