"""Markdown from names and numbers of files: text there may not open markup of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chanfmt.base.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """``rows`` under ``headings``."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(inline(cell) for cell in line) + " |" for line in lines)


def inline(text: str) -> str:
    """``text`` as a part of a line."""
    flat = " ".join(printable(text).split())
    return flat.replace("|", "/").replace("`", "'").replace("<", "(").replace(">", ")")
