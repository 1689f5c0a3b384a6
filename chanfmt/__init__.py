"""chanfmt: the importance atlas, a file format for channel importance in language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chanfmt.base.version import __version__

if TYPE_CHECKING:
    import os

    from chanfmt.format.reader import Atlas

__all__ = ["__version__", "open"]


def open(path: str | os.PathLike[str], *, verify: bool = False, contained: bool = False) -> Atlas:
    """Open an importance atlas for reading.

    Args:
        path: The file, or ``hf://datasets/USER/NAME[@REVISION]/FILE``.
        verify: Recompute the digests and refuse a file that was changed.
        contained: Try it in a process of its own first: for files nobody vouches for.

    Raises:
        chanfmt.base.errors.AtlasError: Missing, not an atlas, damaged or unsafe.
        chanfmt.hub.failures.HubError: It cannot be had from the Hub.
    """
    from chanfmt.hub.locate import open_atlas

    return open_atlas(path, verify=verify, contained=contained)
