"""Markdown from names and numbers that come from files: such text must not start markup of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chanfmt.base.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """``rows`` under ``headings`` as a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(inline(cell) for cell in line) + " |" for line in lines)


def inline(text: str) -> str:
    """``text`` as part of a line of Markdown, with the characters that mean something there replaced by similar ones."""
    flat = " ".join(printable(text).split())
    return flat.replace("|", "/").replace("`", "'").replace("<", "(").replace(">", ")")
