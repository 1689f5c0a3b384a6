"""Open an HDF5 file that nobody vouches for (spec section "Security").

`open_container` is the only place in the project that opens an atlas for reading. It refuses
links out of the file, virtual and external data, filters, references and shapes that the file
does not hold, before anything is read, so that what comes after may index freely.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

# HDF5 would otherwise load filter code from a directory on this machine for a foreign file.
os.environ.setdefault("HDF5_PLUGIN_PRELOAD", "::")

import itertools

import h5py
import numpy as np

from chanfmt import schema
from chanfmt.errors import AtlasError, first_line

SIGNATURE = b"\x89HDF\r\n\x1a\n"
MAX_DEPTH = 3
MAX_OBJECTS = 20_000
MAX_ATTRIBUTES = 64
MAX_TEXT = 16 << 20
MAX_RANK = 4
ALLOWED_DTYPES = {"|u1": "u1", "<i4": "i4", "<i8": "i8", "<f4": "f4", "<f8": "f8"}
SCALE_ATTRIBUTES = frozenset(
    {"CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST", "DIMENSION_LABELS", "_Netcdf4Dimid", "_Netcdf4Coordinates"}
)
"""Bookkeeping of HDF5 dimension scales and netCDF-4; neither read nor digested as attributes."""


def open_container(path: str | os.PathLike[str]) -> h5py.File:
    """Open ``path`` read-only, unlocked, after checking its whole structure.

    Raises:
        AtlasError: The file is missing, not an atlas, of a newer major version, or unsafe.
    """
    path = Path(path)
    _check_outside(path)
    try:
        file = h5py.File(path, "r", locking=False, track_order=True)
    except OSError as error:
        raise AtlasError(f"{path} is damaged: {first_line(error)}", hint="copy it again, or rebuild it") from None
    try:
        _gate(file, path)
        _walk(file, path)
    except AtlasError:
        file.close()
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        file.close()
        raise AtlasError(f"{path} is damaged: {first_line(error)}", hint="copy it again, or rebuild it") from None
    return file


def read_text(value: object, what: str) -> str:
    """An attribute's value as text. Raises `AtlasError` where it is anything else."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        raise AtlasError(f"{what} is not a text")
    if len(value) > MAX_TEXT:
        raise AtlasError(f"{what} is longer than {MAX_TEXT} characters")
    return value


def dtype_code(dataset: h5py.Dataset) -> str | None:
    """``f4 f8 i4 i8 u1 str``, or None for a type that an atlas may not hold."""
    string = h5py.check_string_dtype(dataset.dtype)
    if string is not None:
        return "str" if string.length is None else None
    return ALLOWED_DTYPES.get(dataset.dtype.str) if dataset.dtype.kind in "uif" else None


def _check_outside(path: Path) -> None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise AtlasError(f"{path} does not exist", hint="build one with: atlas build MODEL -o FILE") from None
    except OSError as error:
        raise AtlasError(f"{path} cannot be opened: {error.strerror}") from None
    if stat.S_ISDIR(status.st_mode):
        raise AtlasError(f"{path} is a directory, not an atlas file")
    if not stat.S_ISREG(status.st_mode):
        raise AtlasError(f"{path} is not a regular file")
    if status.st_size == 0:
        raise AtlasError(f"{path} is empty")
    try:
        with open(path, "rb") as raw:
            signature = raw.read(len(SIGNATURE))
    except OSError as error:
        raise AtlasError(f"{path} cannot be read: {error.strerror}") from None
    if signature != SIGNATURE:
        raise AtlasError(f"{path} is not an importance atlas (not an HDF5 file)")


def _gate(file: h5py.File, path: Path) -> None:
    if "format" not in file.attrs or read_text(file.attrs["format"], "format") != schema.FORMAT:
        raise AtlasError(f"{path} is an HDF5 file but not an importance atlas")
    version = read_text(file.attrs.get("format_version", ""), "format_version")
    major, _, minor = version.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        raise AtlasError(f"{path} has an unreadable format_version {version!r}")
    ours = schema.FORMAT_VERSION.partition(".")[0]
    if int(major) != int(ours):
        producer = read_text(file.attrs.get("producer", "an unknown program"), "producer")
        raise AtlasError(
            f"{path} was written by {producer} as version {version}; this chanfmt reads {ours}.x",
            hint="upgrade with: pip install -U chanfmt",
        )
    features = read_text(file.attrs.get("features_required", ""), "features_required").split()
    unknown = sorted(set(features) - schema.KNOWN_FEATURES)
    if unknown:
        raise AtlasError(
            f"{path} needs the feature {unknown[0]!r}, which this chanfmt does not know",
            hint="upgrade with: pip install -U chanfmt",
        )


def _walk(file: h5py.File, path: Path) -> None:
    size = os.stat(path).st_size
    seen: set[object] = set()
    extents: list[tuple[int, int, str]] = []
    pending: list[tuple[h5py.Group, str, int]] = [(file, "", 0)]
    while pending:
        group, prefix, depth = pending.pop()
        _check_attributes(group, prefix or "/", path)
        for name in group:
            where = f"{prefix}/{name}"
            if type(group.get(name, getlink=True)) is not h5py.HardLink:
                raise AtlasError(f"{path}: {where} is a link; atlases hold their data themselves")
            item = group[name]
            info = h5py.h5o.get_info(item.id)
            if (info.fileno, info.addr) in seen:
                raise AtlasError(f"{path}: {where} is the same object as another name")
            seen.add((info.fileno, info.addr))
            if len(seen) > MAX_OBJECTS:
                raise AtlasError(f"{path} holds more than {MAX_OBJECTS} objects")
            if isinstance(item, h5py.Group):
                if depth + 1 > MAX_DEPTH:
                    raise AtlasError(f"{path}: {where} is nested too deep")
                pending.append((item, where, depth + 1))
            elif isinstance(item, h5py.Dataset):
                _check_attributes(item, where, path)
                _check_dataset(item, where, path, size, extents)
            else:
                raise AtlasError(f"{path}: {where} is neither a group nor a dataset")
    extents.sort()
    for (_, end, first), (start, _, second) in itertools.pairwise(extents):
        if start < end:
            raise AtlasError(f"{path}: {first} and {second} share storage")


def _check_attributes(item: h5py.Group | h5py.Dataset, where: str, path: Path) -> None:
    if len(item.attrs) > MAX_ATTRIBUTES:
        raise AtlasError(f"{path}: {where} has more than {MAX_ATTRIBUTES} attributes")


def _check_dataset(
    dataset: h5py.Dataset, where: str, path: Path, size: int, extents: list[tuple[int, int, str]]
) -> None:
    code = dtype_code(dataset)
    if code is None:
        raise AtlasError(f"{path}: {where} has a type that an atlas may not hold ({dataset.dtype})")
    if dataset.shape is None or not 1 <= len(dataset.shape) <= MAX_RANK or 0 in dataset.shape:
        raise AtlasError(f"{path}: {where} has the impossible shape {dataset.shape}")
    if dataset.is_virtual or dataset.external:
        raise AtlasError(f"{path}: {where} keeps its data in another file")
    if dataset.chunks is not None or dataset.compression is not None:
        raise AtlasError(f"{path}: {where} is chunked or compressed; atlases are contiguous")
    offset, stored = dataset.id.get_offset(), dataset.id.get_storage_size()
    points = int(np.prod([int(length) for length in dataset.shape], dtype=object))
    expected = points * (16 if code == "str" else dataset.dtype.itemsize)
    if offset is None or stored != expected or offset + stored > size:
        raise AtlasError(f"{path}: {where} declares {expected} bytes and holds {stored}")
    extents.append((offset, offset + stored, where))

