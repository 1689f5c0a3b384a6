"""The Hub's digests of files, computed from a file to check an upload or a download."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def is_content(path: Path, entry: Any) -> bool:
    """Whether the file ``path`` has the size and the digest of an entry in the Hub's list of files.

    Args:
        entry: A `huggingface_hub.hf_api.RepoFile`.
    """
    if entry.size != path.stat().st_size:
        return False
    return is_named(path, str(entry.lfs.sha256 if entry.lfs is not None else entry.blob_id))


def is_named(path: Path, name: str) -> bool:
    """Whether ``name`` is the Hub's digest of the file ``path``: its SHA-256, or the id of its blob if git holds the file."""
    digest = hashlib.sha256() if len(name) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == name
