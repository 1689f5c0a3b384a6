"""Progress and notes of long work, on stderr."""

from __future__ import annotations

import sys
from typing import Any

from chanfmt.base.text import printable


def say(text: str, *, quiet: bool = False) -> None:
    """Narration: to stderr, so that stdout stays the result."""
    if not quiet:
        print(printable(text), file=sys.stderr, flush=True)


def progress_bar(total: int, unit: str, description: str, *, quiet: bool = False) -> Any:
    """A tqdm bar on stderr with rate and time left; none where that is not a terminal, or ``quiet``."""
    from tqdm import tqdm

    return tqdm(
        total=total, unit=unit, unit_scale=True, desc=description, leave=False, disable=True if quiet else None, file=sys.stderr
    )
