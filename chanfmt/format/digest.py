"""The content digest: it depends on the data, not on how HDF5 lays the data out (spec section "Digest")."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from chanfmt.format.container import Container

SLAB = 8 << 20


SEAL = "producer/file_sha256"
"""The dataset that holds the digest of the file's own bytes."""
SEAL_BYTES = 32


def file_sha256(descriptor: int, offset: int) -> bytes:
    """SHA-256 over the bytes of an open file with the 32 bytes at ``offset`` set to zero."""
    digest = hashlib.sha256()
    position = 0
    while True:
        # HDF5 uses the same descriptor, so its position must not change.
        block = os.pread(descriptor, SLAB if position >= offset else min(SLAB, offset - position), position)
        if not block:
            return digest.digest()
        if position == offset:
            block = bytes(len(block[:SEAL_BYTES])) + block[SEAL_BYTES:]
        digest.update(block)
        position += len(block)


def sealed(image: bytes, offset: int) -> bytes:
    """``image`` with the digest of its bytes in the 32 zero bytes at ``offset``."""
    return image[:offset] + hashlib.sha256(image).digest() + image[offset + SEAL_BYTES :]


def content_sha256(container: Container) -> str:
    """SHA-256 over paths, types, shapes, dimension names, attributes and values of an open atlas.

    Objects come in the code-point order of their paths, and attributes in the order of their names. The root attribute
    ``content_sha256``, `SEAL` and the bookkeeping of dimension scales are left out. Every text is UTF-8, after its
    length in bytes as a little-endian 64-bit integer.
    """
    digest = hashlib.sha256()
    for path in sorted(container.nodes):
        if path == SEAL:
            continue
        node = container.nodes[path]
        if node.code:
            _add(digest, "dataset", "/" + path, node.code, ",".join(map(str, node.shape)), ",".join(container.dimensions(path)))
        else:
            _add(digest, "group", "/" + path)
        for name in sorted(container.attributes(path)):
            if path or name != "content_sha256":
                _add_attribute(digest, name, container.attribute(path, name))
        if node.code:
            _add_values(digest, container, path)
    return digest.hexdigest()


def _add(digest: Any, *texts: str) -> None:
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)


def _add_attribute(digest: Any, name: str, value: Any) -> None:
    if isinstance(value, str):
        _add(digest, "attribute", name, "str", value)
        return
    array = np.atleast_1d(np.asarray(value))
    array = array.astype(array.dtype.newbyteorder("<"))
    _add(digest, "attribute", name, array.dtype.str.lstrip("<|"), ",".join(map(str, array.shape)))
    digest.update(array.tobytes())


def _add_values(digest: Any, container: Container, path: str) -> None:
    node = container.nodes[path]
    if node.code == "str":
        _add(digest, *container.read(path).ravel())
    else:
        step = max(1, SLAB // max(1, node.nbytes // node.shape[0]))
        for start in range(0, node.shape[0], step):
            digest.update(container.rows(path, start, min(start + step, node.shape[0])))
