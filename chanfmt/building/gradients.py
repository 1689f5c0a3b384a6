"""The file beside the partial atlas of a streamed build: the gradient that the build continues with."""

from __future__ import annotations

import glob
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def gradient_path(partial: Path, block: int) -> Path:
    """File with the gradient of the loss by what ``block`` reads, which belongs to the partial atlas ``partial``."""
    return partial.with_name(f"{partial.name}.gradient-{block}")


def remove_gradients(partial: Path, needed: int | None = None) -> None:
    """Remove the gradient files of ``partial``, except the file of the block ``needed``. Raises `OSError`."""
    for path in partial.parent.glob(f"{glob.escape(partial.name)}.gradient-*"):
        if needed is None or path != gradient_path(partial, needed):
            path.unlink(missing_ok=True)
