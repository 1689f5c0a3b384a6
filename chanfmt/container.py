"""Open an HDF5 file that nobody vouches for (spec section "Security").

`open_container` is the only place in the project that opens an atlas for reading. It refuses
links out of the file, virtual and external data, filters, references and shapes that the file
does not hold, before anything is read, so that what comes after may index freely.
"""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path
from typing import NoReturn

# HDF5 would otherwise load filter code from a directory on this machine for a foreign file.
os.environ.setdefault("HDF5_PLUGIN_PRELOAD", "::")

import itertools

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5t

from chanfmt import schema
from chanfmt.errors import AtlasError, first_line

SIGNATURE = b"\x89HDF\r\n\x1a\n"
MAX_DEPTH = 3
MAX_OBJECTS = 20_000
MAX_ATTRIBUTES = 64
MAX_TEXT = 16 << 20
MAX_RANK = 4
TEXT_REFERENCE = 16
"""Bytes that a dataset holds for each of its texts: a length, a heap's address, an index."""
ALLOWED_DTYPES = {"|u1": "u1", "<i4": "i4", "<i8": "i8", "<f4": "f4", "<f8": "f8"}
SCALE_ATTRIBUTES = frozenset(
    {"CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST", "DIMENSION_LABELS", "_Netcdf4Dimid", "_Netcdf4Coordinates"}
)
"""Bookkeeping of HDF5 dimension scales and netCDF-4; neither read nor digested as attributes."""


_COPY = "copy it again, or rebuild it"


def open_container(path: str | os.PathLike[str]) -> h5py.File:
    """Open ``path`` read-only, unlocked, after checking its whole structure.

    Raises:
        AtlasError: The file is missing, not an atlas, of a newer major version, or unsafe. Its ``code``
            is the rule of level 0 that the file breaks; empty where there is no file to speak of.
    """
    path = Path(path)
    size = _check_outside(path)
    try:
        file = h5py.File(path, "r", locking=False, track_order=True)
    except OSError as error:
        raise AtlasError(f"{path} is damaged: {first_line(error)}", hint=_COPY, code="E001") from None
    try:
        _gate(file, path)
        _Walk(path, size).run(file)
    except AtlasError:
        file.close()
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        file.close()
        raise AtlasError(f"{path} is damaged: {first_line(error)}", hint=_COPY, code="E001") from None
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


def _check_outside(path: Path) -> int:
    """Check what can be seen without HDF5. Returns the file's size."""
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
        raise AtlasError(f"{path} is empty", code="E001")
    try:
        with open(path, "rb") as raw:
            superblock = raw.read(64)
    except OSError as error:
        raise AtlasError(f"{path} cannot be read: {error.strerror}") from None
    if not superblock.startswith(SIGNATURE):
        raise AtlasError(f"{path} is not an importance atlas (not an HDF5 file)", code="E001")
    end = _stated_end(superblock)
    if end is not None and end != status.st_size:
        raise AtlasError(f"{path} has {status.st_size} bytes and should have {end}", hint=_COPY, code="E016")
    return status.st_size


def _stated_end(superblock: bytes) -> int | None:
    """The end of file that an HDF5 superblock states; None where only HDF5 can tell."""
    version = superblock[8] if len(superblock) > 8 else 255
    offset, widths = {0: (40, 13), 2: (28, 9), 3: (28, 9)}.get(version, (0, 0))
    if not offset or len(superblock) < offset + 8 or superblock[widths] != 8:
        return None
    return int(struct.unpack_from("<Q", superblock, offset)[0])


def _gate(file: h5py.File, path: Path) -> None:
    if "format" not in file.attrs or file.attrs["format"] != schema.FORMAT:
        raise AtlasError(f"{path} is an HDF5 file but not an importance atlas", code="E002")
    version = file.attrs.get("format_version", "")
    major, _, minor = version.partition(".") if isinstance(version, str) else ("", "", "")
    if not (version.isascii() and major.isdigit() and minor.isdigit() and len(version) < 16):
        raise AtlasError(f"{path} has an unreadable format_version {version!r:.40}", code="E003")
    ours = schema.FORMAT_VERSION.partition(".")[0]
    if int(major) != int(ours):
        producer = read_text(file.attrs.get("producer", "an unknown program"), "producer")
        raise AtlasError(
            f"{path} was written by {producer} as version {version}; this chanfmt reads {ours}.x",
            hint="upgrade with: pip install -U chanfmt", code="E004",
        )
    features = read_text(file.attrs.get("features_required", ""), "features_required").split()
    unknown = sorted(set(features) - schema.KNOWN_FEATURES)
    if unknown:
        raise AtlasError(
            f"{path} needs the feature {unknown[0]!r}, which this chanfmt does not know",
            hint="upgrade with: pip install -U chanfmt", code="E005",
        )


class _Walk:
    """Every object of a file, checked before any value is read.

    It uses HDF5's own calls: h5py's convenient objects would take five times as long.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self.seen: set[tuple[int, int]] = set()
        self.extents: list[tuple[int, int, str]] = []

    def run(self, file: h5py.File) -> None:
        self._attributes(file.id, "/")
        pending: list[tuple[h5g.GroupID, str, int]] = [(h5g.open(file.id, b"/"), "", 0)]
        while pending:
            group, prefix, depth = pending.pop()
            for raw in group:
                where = f"{prefix}/{raw.decode('utf-8', 'replace')}"
                if group.links.get_info(raw).type != h5l.TYPE_HARD:
                    self._refuse("E006", where, "is a link; atlases hold their data themselves")
                info = h5o.get_info(group, raw)
                if (info.fileno, info.addr) in self.seen:
                    self._refuse("E007", where, "is the same object as another name")
                self.seen.add((info.fileno, info.addr))
                if len(self.seen) > MAX_OBJECTS:
                    raise AtlasError(f"{self.path} holds more than {MAX_OBJECTS} objects", code="E008")
                if info.type not in (h5o.TYPE_GROUP, h5o.TYPE_DATASET):
                    self._refuse("E009", where, "is neither a group nor a dataset")
                item = h5o.open(group, raw)
                self._attributes(item, where)
                if isinstance(item, h5g.GroupID):
                    if depth + 1 > MAX_DEPTH:
                        self._refuse("E008", where, "is nested too deep")
                    pending.append((item, where, depth + 1))
                else:
                    self._dataset(item, where)
        self.extents.sort()
        for (_, end, first), (start, _, second) in itertools.pairwise(self.extents):
            if start < end:
                raise AtlasError(f"{self.path}: {first} and {second} share storage", code="E015", where=second)

    def _refuse(self, code: str, where: str, complaint: str) -> NoReturn:
        raise AtlasError(f"{self.path}: {where} {complaint}", code=code, where=where)

    def _attributes(self, item: h5g.GroupID | h5d.DatasetID, where: str) -> None:
        count = h5a.get_num_attrs(item)
        if count > MAX_ATTRIBUTES:
            self._refuse("E008", where, f"has more than {MAX_ATTRIBUTES} attributes")
        for index in range(count):
            attribute = h5a.open(item, index=index)
            name = attribute.name.decode("utf-8", "replace")
            if name in SCALE_ATTRIBUTES:
                continue
            kind = attribute.get_type()
            code = _type_code(kind)
            if name == "flag_values" and code == "u1" and len(attribute.shape) == 1 and attribute.shape[0] <= 256:
                continue
            if code not in ("str", "i8", "f8") or attribute.get_space().get_simple_extent_type() != h5py.h5s.SCALAR:
                self._refuse("E018", f"{where}@{name}", "is not a single text, 64-bit integer or double")

    def _dataset(self, dataset: h5d.DatasetID, where: str) -> None:
        kind = dataset.get_type()
        code = _type_code(kind)
        if code is None:
            self._refuse("E010", where, f"has a type that an atlas may not hold ({dataset.dtype})")
        space = dataset.get_space()
        if space.get_simple_extent_type() != h5py.h5s.SIMPLE or not 1 <= len(dataset.shape) <= MAX_RANK or 0 in dataset.shape:
            self._refuse("E011", where, f"has the impossible shape {dataset.shape}")
        properties = dataset.get_create_plist()
        layout = properties.get_layout()
        if layout == h5d.VIRTUAL or properties.get_external_count():
            self._refuse("E012", where, "keeps its data in another file")
        if layout != h5d.CONTIGUOUS or properties.get_nfilters():
            self._refuse("E013", where, "is chunked or compressed; atlases are contiguous")
        offset, stored = dataset.get_offset(), dataset.get_storage_size()
        points = int(np.prod([int(length) for length in dataset.shape], dtype=object))
        expected = points * (TEXT_REFERENCE if code == "str" else kind.get_size())
        if offset is None or stored != expected or offset + stored > self.size:
            self._refuse("E014", where, f"declares {expected} bytes and holds {stored}")
        if code == "str":
            self._texts(offset, points, where)
        self.extents.append((offset, offset + stored, where))

    def _texts(self, offset: int, points: int, where: str) -> None:
        """Texts that share a heap object could claim far more memory than the file has bytes."""
        with open(self.path, "rb") as raw:
            raw.seek(offset)
            references = np.frombuffer(raw.read(points * TEXT_REFERENCE), dtype="<u4").reshape(-1, 4)
        claimed = int(references[:, 0].sum(dtype=np.uint64))
        if claimed > self.size:
            self._refuse("E014", where, f"claims {claimed} bytes of text in a file of {self.size}")


def _type_code(kind: h5t.TypeID) -> str | None:
    """``f4 f8 i4 i8 u1 str``, or None for a type that an atlas may not hold."""
    if isinstance(kind, h5t.TypeStringID):
        return "str" if kind.is_variable_str() else None
    if isinstance(kind, h5t.TypeIntegerID | h5t.TypeFloatID):
        return ALLOWED_DTYPES.get(kind.dtype.str) if kind.equal(h5t.py_create(kind.dtype)) else None
    return None
