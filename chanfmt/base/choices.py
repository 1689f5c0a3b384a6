"""Errors about a word that is not among the known ones, with the known word that is most like it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chanfmt.base.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable


def unknown(noun: str, word: str, known: Iterable[str], *, hint: str | None = None) -> UsageError:
    """An error that names what ``word`` may have been, for the caller to raise.

    Args:
        noun: What ``word`` should have named, such as ``recovery``.
        known: What it may be, in the order in which it is listed.
    """
    names = list(known)
    return UsageError(f"unknown {noun} {word!r}; choose from {', '.join(names)}{did_you_mean(word, names)}", hint=hint)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean NAME?`` with the name most like ``word``, or nothing if no name is like it."""
    from difflib import get_close_matches

    names = list(known)
    longer = [name for name in names if len(word.strip("-")) > 1 and name.startswith(word)]
    closest = longer if len(longer) == 1 else get_close_matches(word.lower(), names, n=1)
    return f"; did you mean {closest[0]}?" if closest else ""
