"""Atlases by name: a path, or an address on the Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from chanfmt.hub.names import is_address, parse_address

SUFFIX = ".h5"


class Located(NamedTuple):
    """Where an atlas lies.

    Attributes:
        path: The file.
        source: Which file of which commit on the Hub it is; empty where it was named by its path.
    """

    path: Path
    source: str


def locate(name: str | Path) -> Located:
    """The file called ``name``; one on the Hub is fetched to the Hub cache.

    Raises:
        UsageError: The address names nothing, or several files.
        HubError: It cannot be had.
        CheckError: It arrived damaged.
    """
    if isinstance(name, Path) or not is_address(name):
        return Located(Path(name), "")
    from chanfmt.base.narrate import say
    from chanfmt.hub.fetch import fetch

    fetched = fetch(parse_address(name), suffix=SUFFIX, note=say, progress=sys.stderr.isatty())
    return Located(fetched.path, str(fetched.source))
