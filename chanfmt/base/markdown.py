"""Markdown from names and numbers that come from files: such text must not start markup of its own.

Renderers link addresses and mentions even if their characters are escaped, but never inside a code span. So a word that
looks like one becomes a code span. In all other words, the characters that mean something are escaped.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from chanfmt.base.text import one_line

if TYPE_CHECKING:
    from collections.abc import Sequence

_LINKED = re.compile(r"://|www\.|(?:mailto|xmpp):|@\w|\w@|(?:\bGH-|#)\d", re.IGNORECASE)
"""Part of a word that a renderer may turn into a link: an address, a mention, an issue."""
_MARKUP = re.compile(r"[\\`*\[\]|~$]|&(?=#?\w+;)|(?<!\w)_|_(?!\w)")
"""A character that means something inside a line. An underscore inside a word means nothing."""
_START = re.compile(r"(?=(?:#{1,6}|[-+]|-+|=+)(?:\s|$)|>)|\d{1,9}(?=[.)](?:\s|$))")
"""What stands before the character that would make a line a heading, an item of a list, a rule or a quotation."""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """``rows`` under ``headings`` as a Markdown table."""
    lines = [[inline(cell) for cell in line] for line in (headings, *rows)]
    lines.insert(1, ["---"] * len(headings))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_IN_CODE = str.maketrans({"`": "'", "|": "/", "<": "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}"})


def inline(text: str) -> str:
    """``text`` as part of a line of Markdown: shown as it is, without links, images, mentions or other markup."""
    words = one_line(text).split()
    return " ".join(code(word) if _LINKED.search(word) else _escaped(word) for word in words)


def _escaped(word: str) -> str:
    # An escaped "<" may begin a tag in programs that look for HTML before they look for Markdown.
    return _MARKUP.sub(r"\\\g<0>", word).replace("<", "&lt;")


def paragraph(text: str) -> str:
    """``text`` as `inline`, for the beginning of a line."""
    return _START.sub(r"\g<0>\\", shown, count=1) if _START.match(shown := inline(text)) else shown


def code(text: str) -> str:
    """``text`` as a code span, which holds no markup; empty for a blank text."""
    flat = " ".join(one_line(text).split())
    # A pipe would end a cell of a table, and "<" may begin a tag in programs that look for HTML before they look for Markdown.
    return f"`{flat.translate(_IN_CODE)}`" if flat else ""


def fenced(text: str) -> str:
    """``text`` as a line inside a code fence, where only the end of the fence has a meaning."""
    return one_line(text).replace("```", "'''")
