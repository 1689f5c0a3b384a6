"""Errors about a word that is not among the known ones, with the known word that is most like it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chanfmt.base.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

_MOST = 3
"""Most names that are suggested for one word."""


def unknown(noun: str, word: str, known: Iterable[str], *, hint: str | None = None) -> UsageError:
    """An error that names what ``word`` may have been, for the caller to raise.

    Args:
        noun: What ``word`` should have named, such as ``recovery``.
        known: What it may be, in the order in which it is listed.
    """
    names = list(known)
    return UsageError(f"unknown {noun} {word!r}; choose from {', '.join(names)}{did_you_mean(word, names)}", hint=hint)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean NAME?`` with the names that begin with ``word`` or the name most like it; empty if none is like it."""
    from difflib import get_close_matches

    names = list(known)
    closest = [name for name in names if len(word.strip("-")) > 1 and name.startswith(word)]
    if not 1 <= len(closest) <= _MOST:
        closest = get_close_matches(word.lower(), names, n=1)
    *others, last = closest or [""]
    return f"; did you mean {', '.join(others) + ' or ' if others else ''}{last}?" if last else ""
