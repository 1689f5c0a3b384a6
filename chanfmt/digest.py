"""The content digest: what an atlas says, independent of how HDF5 laid it out (spec section "Digest")."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from chanfmt.container import SCALE_ATTRIBUTES, dtype_code, read_text

if TYPE_CHECKING:
    from pathlib import Path

SLAB = 8 << 20


SEAL = "producer/file_sha256"
"""The dataset that holds the digest of the file's own bytes."""
SEAL_BYTES = 32


def file_sha256(path: Path, offset: int) -> bytes:
    """SHA-256 over the bytes of ``path`` with the 32 bytes at ``offset`` set to zero."""
    digest = hashlib.sha256()
    with open(path, "rb") as raw:
        left = offset
        while left and (block := raw.read(min(SLAB, left))):
            digest.update(block)
            left -= len(block)
        raw.seek(offset + SEAL_BYTES)
        digest.update(bytes(SEAL_BYTES))
        while block := raw.read(SLAB):
            digest.update(block)
    return digest.digest()


def sealed(image: bytes, offset: int) -> bytes:
    """``image`` with the digest of its bytes in the 32 zero bytes at ``offset``."""
    return image[:offset] + hashlib.sha256(image).digest() + image[offset + SEAL_BYTES :]


def content_sha256(file: h5py.File) -> str:
    """SHA-256 over paths, types, shapes, dimension names, attributes and values of an open atlas.

    Objects are visited by path in code-point order, attributes by name; the root attribute
    ``content_sha256``, `SEAL` and the bookkeeping of dimension scales are left out. Every text is UTF-8,
    preceded by its length in bytes as a little-endian 64-bit integer.
    """
    digest = hashlib.sha256()
    paths: list[str] = []
    file.visit(paths.append)
    for path in ["", *sorted(path for path in paths if path != SEAL)]:
        item = file[path] if path else file
        if isinstance(item, h5py.Dataset):
            code = dtype_code(item) or str(item.dtype)
            _add(digest, "dataset", "/" + path, code, ",".join(map(str, item.shape)), ",".join(dimensions(item)))
        else:
            _add(digest, "group", "/" + path)
        for name in sorted(item.attrs):
            if name in SCALE_ATTRIBUTES or (not path and name == "content_sha256"):
                continue
            _add_attribute(digest, name, item.attrs[name])
        if isinstance(item, h5py.Dataset):
            _add_values(digest, item)
    return digest.hexdigest()


def dimensions(dataset: h5py.Dataset) -> list[str]:
    """Names of the dimension scales along ``dataset``'s axes; a scale names its own."""
    if dataset.is_scale:
        return [_leaf(dataset)]
    return [_leaf(axis[0]) if len(axis) else "" for axis in dataset.dims]


def _leaf(dataset: h5py.Dataset) -> str:
    return str(dataset.name).rsplit("/", 1)[-1]


def _add(digest: Any, *texts: str) -> None:
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)


def _add_attribute(digest: Any, name: str, value: Any) -> None:
    if isinstance(value, str | bytes):
        _add(digest, "attribute", name, "str", read_text(value, name))
        return
    array = np.atleast_1d(np.asarray(value))
    if array.dtype.kind in "OSU":
        _add(digest, "attribute", name, "str", *(read_text(item, name) for item in array))
        return
    array = array.astype(array.dtype.newbyteorder("<"))
    _add(digest, "attribute", name, array.dtype.str.lstrip("<|"), ",".join(map(str, array.shape)))
    digest.update(array.tobytes())


def _add_values(digest: Any, dataset: h5py.Dataset) -> None:
    if dtype_code(dataset) == "str":
        _add(digest, *(read_text(item, dataset.name) for item in dataset[...].ravel()))
        return
    row_bytes = max(1, dataset.dtype.itemsize * int(np.prod(dataset.shape[1:])))
    rows = max(1, SLAB // row_bytes)
    for start in range(0, dataset.shape[0], rows):
        digest.update(np.ascontiguousarray(dataset[start : start + rows]).tobytes())
