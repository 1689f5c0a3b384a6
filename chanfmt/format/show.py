"""Short texts about an atlas and its parts, for notebooks and debuggers.

The texts of a file are untrusted: `short` strips control characters and limits the length, `table` escapes for HTML.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from chanfmt.base.html import inline
from chanfmt.base.text import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LONGEST = 60
"""Characters of a file's text that are shown."""
MOST_SHAPES = 4
"""Different shapes of FFNs that one line names."""


def short(text: str, length: int = LONGEST) -> str:
    """``text`` in one line of at most ``length`` characters, without control characters.

    >>> short("a\\x1b[31mb")
    'a\N{REPLACEMENT CHARACTER}[31mb'
    """
    return one_line(text, length)


def model_name(model_id: str) -> str:
    """A model's Hub id without its owner, as `short` text."""
    return short(model_id.rstrip("/").rpartition("/")[2] or model_id)


def units_text(shape: tuple[int, ...]) -> str:
    """The channels of one FFN of `Block.shape`.

    >>> units_text((64, 1408))
    '64 experts x 1,408'
    """
    return " x ".join(
        f"{size:,}" if place else f"{size:,} experts" for place, size in enumerate(shape, start=int(len(shape) == 1))
    )


def ffns_text(shapes: Iterable[tuple[int, ...]]) -> str:
    """How many FFNs have which `Block.shape`; the most frequent shape comes first.

    >>> ffns_text([(14336,)] * 32)
    '32 FFNs x 14,336'
    """
    counts = Counter(shapes).most_common()
    texts = [f"{count:,} FFN{'s' if count > 1 else ''} x {units_text(shape)}" for shape, count in counts[:MOST_SHAPES]]
    if len(counts) > MOST_SHAPES:
        texts.append(f"{sum(count for _, count in counts[MOST_SHAPES:]):,} FFNs of other widths")
    return ", ".join(texts) or "no FFNs"


def atlas_text(model_id: str, shapes: Iterable[tuple[int, ...]], status: str) -> str:
    """The model that an atlas measured, its FFNs, and "partial" if the build is unfinished."""
    unfinished = "" if status == "complete" else ", partial"
    return f"{model_name(model_id)}, {ffns_text(shapes)}{unfinished}"


def table(caption: str, rows: Sequence[tuple[str, str]]) -> str:
    """An HTML table with one row per name and value, every text escaped."""
    body = "".join(f'<tr><th style="text-align:left">{inline(name)}</th><td>{inline(value)}</td></tr>' for name, value in rows)
    return f"<table><caption>{inline(caption)}</caption>{body}</table>"
