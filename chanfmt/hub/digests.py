"""What the Hub calls a file's content, computed from the file: how an upload or a download is checked."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def is_content(path: Path, entry: Any) -> bool:
    """Whether the file ``path`` is what the Hub's file list says of a file.

    Args:
        entry: A `huggingface_hub.hf_api.RepoFile`.
    """
    if entry.size != path.stat().st_size:
        return False
    return is_named(path, str(entry.lfs.sha256 if entry.lfs is not None else entry.blob_id))


def is_named(path: Path, name: str) -> bool:
    """Whether ``name`` is what the Hub calls the content of ``path``: its SHA-256, or git's id where git holds it."""
    digest = hashlib.sha256() if len(name) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == name
