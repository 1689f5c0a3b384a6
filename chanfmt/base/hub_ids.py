"""The names that repositories of the Hub can have. A file may claim any name, and only such a name is looked up."""

from __future__ import annotations

import re

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"{_NAME}(?:/{_NAME})?")
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_LONGEST = 96


def is_hub_id(text: str) -> bool:
    """Whether ``text`` can be the id of a repository, ``USER/NAME`` or ``NAME``: a part of huggingface_hub's own rule."""
    fits = len(text) <= _LONGEST and _ID.fullmatch(text) is not None
    return fits and ".." not in text and "--" not in text and not text.endswith(".git")


def is_commit(text: str) -> bool:
    """Whether ``text`` can be a commit: hexadecimal, and so neither a path nor a branch."""
    return _COMMIT.fullmatch(text) is not None
