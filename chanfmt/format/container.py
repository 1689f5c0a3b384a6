"""Open an HDF5 file that nobody vouches for (spec section "Security").

`open_container` is the only place in the project that opens an atlas for reading. Before it reads any
values, it refuses links out of the file, virtual and external data, filters, references and shapes
that the file does not hold. Code that reads values afterwards may index freely.
"""

from __future__ import annotations

import os
import stat
import struct

# Otherwise a file from elsewhere could make HDF5 load filter code from a directory on this machine.
os.environ.setdefault("HDF5_PLUGIN_PRELOAD", "::")

import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

import h5py
import numpy as np
from h5py import h5a, h5d, h5ds, h5g, h5s, h5t

from chanfmt.base.errors import AtlasError, first_line
from chanfmt.format import schema
from chanfmt.format.mistaken import way_out
from chanfmt.format.read_errors import COPY_AGAIN, UnreadableError, read_error
from chanfmt.format.unlocked import open_unlocked

if TYPE_CHECKING:
    from collections.abc import Callable

    from chanfmt.format.unlocked import Unlocked

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

SIGNATURE = b"\x89HDF\r\n\x1a\n"
MAX_DEPTH = 3
MAX_OBJECTS = 20_000
MAX_ATTRIBUTES = 64
MAX_TEXT = 16 << 20
MAX_VALUES = 256
"""Numbers in an attribute. Only ``flag_values`` has more than one."""
MAX_RANK = 4
TEXT_REFERENCE = 16
"""Bytes that a dataset holds for each of its texts: a length, the address of a heap, an index."""
NUMPY = {"u1": "u1", "i4": "<i4", "i8": "<i8", "f4": "<f4", "f8": "<f8"}
TYPES = {"f4": h5t.IEEE_F32LE, "f8": h5t.IEEE_F64LE, "i4": h5t.STD_I32LE, "i8": h5t.STD_I64LE, "u1": h5t.STD_U8LE}
SCALE_ATTRIBUTES = frozenset(
    {"CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST", "DIMENSION_LABELS", "_Netcdf4Dimid", "_Netcdf4Coordinates"}
)
"""Attributes that HDF5 dimension scales and netCDF-4 use for bookkeeping; we neither read nor digest them."""


def _guarded(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Turn the errors that HDF5 raises on a damaged file into `AtlasError`."""

    @functools.wraps(method)
    def guarded(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        try:
            return method(*arguments, **options)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise read_error(error, "the file") from None

    return guarded


@dataclass(slots=True)
class Node:
    """One object of a file: a group if ``code`` is empty, otherwise a dataset.

    Attributes:
        code: Type, one of ``f4 f8 i4 i8 u1 str``.
        shape: Lengths of the axes.
        offset: Position in the file of the first byte of the values.
    """

    id: h5g.GroupID | h5d.DatasetID
    code: str = ""
    shape: tuple[int, ...] = ()
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the values; a text counts with its reference."""
        return math.prod(self.shape) * (TEXT_REFERENCE if self.code == "str" else int(self.code[1]))


class Container:
    """An open file whose structure was checked. It gives every object by path; the path of the root is ``""``.

    It uses HDF5's own calls, because h5py's convenient objects take five times as long.
    """

    def __init__(self, opened: Unlocked, path: Path | None, size: int) -> None:
        """Walk through a file.

        Args:
            path: Its path; None for a file that is in memory only.
            size: Its bytes. All texts together may not claim more.

        Raises:
            AtlasError: The file breaks a rule of level 0.
        """
        self.path = path
        self.nodes: dict[str, Node] = {}
        self._opened = opened
        self._size = size
        self._text_bytes = 0
        self._counted: set[tuple[str, str]] = set()
        """Attributes whose text is in ``_text_bytes``: path and name."""
        self._by_address: dict[tuple[int, int], str] = {}
        """Address, a pair of machine words, to path. Links out of the file are refused, so all objects are in this file."""
        self._children: dict[str, list[str]] = {}
        self._walk()

    @property
    def descriptor(self) -> int:
        """Descriptor of the open file. By now, ``path`` may name another file."""
        return self._opened.descriptor

    def __contains__(self, path: str) -> bool:
        return path in self.nodes

    def children(self, path: str) -> list[str]:
        """Names in the group ``path``; empty if there is no such group."""
        return self._children.get(path, [])

    def is_group(self, path: str) -> bool:
        return path in self._children

    @_guarded
    def is_scale(self, path: str) -> bool:
        """Whether the dataset is a dimension's own values."""
        return bool(h5ds.is_scale(self.nodes[path].id))

    @_guarded
    def dimensions(self, path: str) -> tuple[str, ...]:
        """Names of the dimension scales along a dataset's axes; "" for an axis without a scale in the dataset's group."""
        node = self.nodes[path]
        parent, _, leaf = path.rpartition("/")
        if h5ds.is_scale(node.id):
            return (leaf,) * len(node.shape)
        return tuple(self._scale(node.id, axis, parent) for axis in range(len(node.shape)))

    @_guarded
    def attributes(self, path: str) -> list[str]:
        """Names of an object's attributes, without bookkeeping."""
        item = self.nodes[path].id
        names = [h5a.open(item, index=index).name.decode("utf-8", "replace") for index in range(h5a.get_num_attrs(item))]
        return [name for name in names if name not in SCALE_ATTRIBUTES]

    @_guarded
    def attribute(self, path: str, name: str) -> Any:
        """An attribute's value: str, numpy scalar or array; None if there is no such attribute.

        Raises:
            AtlasError: The attribute has a type or a length that an atlas may not hold, or the file's texts claim more
                bytes than the file has.
        """
        where = f"/{path}@{name}"
        value = _read_attribute(self.nodes[path].id, name, where)
        if isinstance(value, bytes):
            if (path, name) not in self._counted:
                self._counted.add((path, name))
                self._count_text(len(value), where)
            return read_text(value, where)
        return value

    def read(self, path: str) -> np.ndarray:
        """A dataset's values; texts as an object array of str. Raises `AtlasError` if they cannot be read."""
        return self.rows(path, 0, self.nodes[path].shape[0])

    @_guarded
    def rows(self, path: str, start: int, stop: int) -> np.ndarray:
        """Values ``start`` to ``stop`` along the first axis. Raises `AtlasError` if they cannot be read."""
        node = self.nodes[path]
        shape = (stop - start, *node.shape[1:])
        if node.code == "str":
            texts = h5py.Dataset(node.id)[start:stop]
            values = np.empty(shape, dtype=object)
            values.ravel()[:] = [read_text(text, f"/{path}") for text in texts.ravel()]
            return values
        values = np.empty(shape, dtype=NUMPY[node.code])
        space = node.id.get_space()
        space.select_hyperslab((start, *(0,) * (len(shape) - 1)), shape)
        node.id.read(h5s.create_simple(shape), space, values)
        return values

    @_guarded
    def check_contents(self) -> None:
        """Check the part of level 0 that takes too long for every opening.

        Raises:
            AtlasError: An attribute is not a text, a 64-bit integer or a double, or a text is not UTF-8.
        """
        for path, node in self.nodes.items():
            if node.code == "str":
                self.rows(path, 0, node.shape[0])
            for index in range(h5a.get_num_attrs(node.id)):
                attribute = h5a.open(node.id, index=index)
                name = attribute.name.decode("utf-8", "replace")
                if name in SCALE_ATTRIBUTES:
                    continue
                code = _type_code(attribute.get_type())
                if name == "flag_values" and code == "u1" and len(attribute.shape or ()) == 1 and attribute.shape[0] <= 256:
                    continue
                if code not in ("str", "i8", "f8") or attribute.shape != ():
                    self._refuse("E018", f"/{path}@{name}", "is not a single text, 64-bit integer or double")
                if code == "str":
                    self.attribute(path, name)

    def close(self) -> None:
        self._opened.closing.close()

    def _count_text(self, nbytes: int, where: str) -> None:
        """Refuse texts that claim more memory than the file has bytes, which texts that share a heap object could."""
        self._text_bytes += nbytes
        if self._text_bytes > self._size:
            self._refuse("E014", where, f"brings the texts to {self._text_bytes} bytes in a file of {self._size}")

    def _walk(self) -> None:
        extents: list[tuple[int, int, str]] = []
        self.nodes[""] = Node(h5g.open(self._opened.file.id, b"/"))
        self._count_attributes("")
        pending = [("", 0)]
        while pending:
            prefix, depth = pending.pop()
            group = self.nodes[prefix].id
            self._children[prefix] = []
            for raw in group:
                name = raw.decode("utf-8", "replace")
                path = f"{prefix}/{name}" if prefix else name
                info = h5g.get_objinfo(group, raw, follow_link=False)
                if info.type >= h5g.LINK:
                    self._refuse("E006", f"/{path}", "is a link; atlases hold their data themselves")
                if info.objno in self._by_address:
                    self._refuse("E007", f"/{path}", "is the same object as another name")
                self._by_address[info.objno] = path
                if len(self.nodes) > MAX_OBJECTS:
                    raise AtlasError(f"{self._name} holds more than {MAX_OBJECTS} objects", code="E008")
                if info.type not in (h5g.GROUP, h5g.DATASET):
                    self._refuse("E009", f"/{path}", "is neither a group nor a dataset")
                try:
                    node = Node(h5g.open(group, raw) if info.type == h5g.GROUP else h5d.open(group, raw))
                except (OSError, KeyError, RuntimeError, ValueError) as error:
                    if isinstance(found := read_error(error, "the file"), UnreadableError):
                        raise found from None
                    self._refuse("E014", f"/{path}", f"cannot be opened: {first_line(error)}")
                self.nodes[path] = node
                self._children[prefix].append(name)
                self._count_attributes(path)
                if info.type == h5g.GROUP:
                    if depth + 1 > MAX_DEPTH:
                        self._refuse("E008", f"/{path}", "is nested too deep")
                    pending.append((path, depth + 1))
                else:
                    self._check_dataset(node, f"/{path}")
                    extents.append((node.offset, node.offset + node.nbytes, f"/{path}"))
        extents.sort()
        for (_, end, first), (start, _, second) in itertools.pairwise(extents):
            if start < end:
                raise AtlasError(f"{self._name}: {first} and {second} share storage", code="E015", where=second)

    @property
    def _name(self) -> str:
        return str(self.path or "the atlas")

    def _refuse(self, code: str, where: str, complaint: str) -> NoReturn:
        raise AtlasError(f"{self._name}: {where} {complaint}", code=code, where=where)

    def _count_attributes(self, path: str) -> None:
        if h5a.get_num_attrs(self.nodes[path].id) > MAX_ATTRIBUTES:
            self._refuse("E008", f"/{path}", f"has more than {MAX_ATTRIBUTES} attributes")

    def _check_dataset(self, node: Node, where: str) -> None:
        dataset = node.id
        code = _type_code(dataset.get_type())
        if code is None:
            self._refuse("E010", where, f"has a type that an atlas may not hold ({dataset.dtype})")
        space = dataset.get_space()
        simple = space.get_simple_extent_type() == h5s.SIMPLE
        shape = space.get_simple_extent_dims() if simple else ()
        if not 1 <= len(shape) <= MAX_RANK or 0 in shape:
            self._refuse("E011", where, f"has the impossible shape {shape}")
        node.code, node.shape = code, shape
        offset, stored, expected = dataset.get_offset(), dataset.get_storage_size(), node.nbytes
        if offset is None:
            self._check_layout(dataset, where)
        if offset is None or stored != expected or offset + stored > self._size:
            self._refuse("E014", where, f"declares {expected} bytes and holds {stored}")
        node.offset = offset
        if code == "str" and self.path is not None:
            self._count_texts(node, where)

    def _check_layout(self, dataset: h5d.DatasetID, where: str) -> None:
        """Refuse a dataset without an offset in the file, and say why: only a contiguous dataset has one."""
        properties = dataset.get_create_plist()
        layout = properties.get_layout()
        if layout == h5d.VIRTUAL or properties.get_external_count():
            self._refuse("E012", where, "keeps its data in another file")
        if layout != h5d.CONTIGUOUS:
            self._refuse("E013", where, "is chunked or compressed; atlases are contiguous")

    def _count_texts(self, node: Node, where: str) -> None:
        """Count the bytes that the texts of a dataset claim."""
        raw = os.pread(self.descriptor, node.nbytes, node.offset)
        if len(raw) != node.nbytes:
            self._refuse("E014", where, "ends before its values do")
        references = np.frombuffer(raw, dtype="<u4").reshape(-1, 4)
        self._count_text(int(references[:, 0].sum(dtype=np.uint64)), where)

    def _scale(self, dataset: h5d.DatasetID, axis: int, parent: str) -> str:
        if h5ds.get_num_scales(dataset, axis) != 1:
            return ""
        found = h5ds.iterate(dataset, axis, lambda scale: h5g.get_objinfo(scale).objno)
        place, _, name = self._by_address.get(found, "").rpartition("/")
        return name if place == parent else ""


def open_container(path: str | os.PathLike[str]) -> Container:
    """Open ``path`` read-only, unlocked, after checking its whole structure.

    Raises:
        AtlasError: The file is missing, not an atlas, of a newer major version, or unsafe. The error's ``code``
            is the rule of level 0 that the file breaks; empty if no file could be read.
    """
    path = Path(path)
    while True:
        status = _check_outside(path)
        try:
            opened = open_unlocked(path)
        except OSError as error:
            raise read_error(error, str(path)) from None
        if os.path.samestat(status, os.fstat(opened.descriptor)):
            break
        # A writer has just replaced the file.
        opened.closing.close()
    try:
        _gate(h5g.open(opened.file.id, b"/"), path)
        return Container(opened, path, status.st_size)
    except AtlasError:
        opened.closing.close()
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        opened.closing.close()
        raise read_error(error, str(path)) from None


def read_text(value: object, what: str) -> str:
    """A value of the file as text. Raises `AtlasError` if the value is not a text."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise AtlasError(f"{what} is not UTF-8", code="E018" if "@" in what else "E010", where=what) from None
    if not isinstance(value, str):
        raise AtlasError(f"{what} is not a text", code="E104", where=what)
    if len(value) > MAX_TEXT:
        raise AtlasError(f"{what} is longer than {MAX_TEXT} characters", code="E018", where=what)
    return value


def _check_outside(path: Path) -> os.stat_result:
    """Check what can be checked without HDF5. Returns the status of the checked file."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise AtlasError(f"{path} does not exist", hint="build one with: atlas build MODEL -o FILE") from None
    except OSError as error:
        raise AtlasError(f"{path} cannot be opened: {error.strerror}") from None
    if stat.S_ISDIR(status.st_mode):
        raise AtlasError(f"{path} is a directory, not an atlas file", hint=way_out(path))
    if not stat.S_ISREG(status.st_mode):
        raise AtlasError(f"{path} is not a regular file")
    if status.st_size == 0:
        raise AtlasError(f"{path} is empty", code="E001")
    try:
        with open(path, "rb") as raw:
            status = os.fstat(raw.fileno())
            superblock = raw.read(64)
    except OSError as error:
        raise AtlasError(f"{path} cannot be read: {error.strerror}") from None
    if not superblock.startswith(SIGNATURE):
        raise AtlasError(f"{path} is not an importance atlas (not an HDF5 file)", hint=way_out(path), code="E001")
    end = _stated_end(superblock)
    if end is not None and end != status.st_size:
        raise AtlasError(f"{path} is damaged: it has {status.st_size} bytes and should have {end}", hint=COPY_AGAIN, code="E016")
    return status


def _stated_end(superblock: bytes) -> int | None:
    """The end of file that an HDF5 superblock states; None if only HDF5 can tell."""
    version = superblock[8] if len(superblock) > 8 else 255
    offset, widths = {0: (40, 13), 2: (28, 9), 3: (28, 9)}.get(version, (0, 0))
    if not offset or len(superblock) < offset + 8 or superblock[widths] != 8:
        return None
    return int(struct.unpack_from("<Q", superblock, offset)[0])


def _gate(root: h5g.GroupID, path: Path) -> None:
    if _root_text(root, "format") != schema.FORMAT:
        raise AtlasError(f"{path} is an HDF5 file but not an importance atlas", code="E002")
    version = _root_text(root, "format_version") or ""
    major, _, minor = version.partition(".")
    if not (version.isascii() and major.isdigit() and minor.isdigit() and len(version) < 16):
        raise AtlasError(f"{path} has an unreadable format_version {version!r:.40}", code="E003")
    ours = schema.FORMAT_VERSION.partition(".")[0]
    if int(major) != int(ours):
        producer = _root_text(root, "producer") or "an unknown program"
        raise AtlasError(
            f"{path} was written by {producer} as version {version}; this chanfmt reads {ours}.x",
            hint="upgrade with: pip install -U chanfmt",
            code="E004",
        )
    features = _root_text(root, "features_required")
    if features is None:
        raise AtlasError("features_required is not a text", code="E104", where="features_required")
    unknown = sorted(set(features.split()) - schema.KNOWN_FEATURES)
    if unknown:
        raise AtlasError(
            f"{path} needs the feature {unknown[0]!r}, which this chanfmt does not know",
            hint="upgrade with: pip install -U chanfmt",
            code="E005",
        )


def _root_text(root: h5g.GroupID, name: str) -> str | None:
    """A text among the root's attributes; "" if there is no such attribute, None if it is something else than a text."""
    try:
        value = _read_attribute(root, name, f"/@{name}")
    except AtlasError:
        return None
    if value is None:
        return ""
    return read_text(value, f"/@{name}") if isinstance(value, bytes) else None


def _read_attribute(item: h5g.GroupID | h5d.DatasetID, name: str, where: str) -> Any:
    """An attribute's value: bytes of a text, numpy scalar or array; None if there is no such attribute.

    Type and length are checked before anything is read: many texts could share one heap object.

    Raises:
        AtlasError: The attribute has a type or a length that an atlas may not hold.
    """
    key = name.encode()
    if not h5a.exists(item, key):
        return None
    attribute = h5a.open(item, key)
    code, shape = _type_code(attribute.get_type()), attribute.shape
    if code is None or shape is None:
        raise AtlasError(f"{where} has a type that an atlas may not hold", code="E018", where=where)
    if len(shape) > 1 or (shape and (code == "str" or shape[0] > MAX_VALUES)):
        raise AtlasError(f"{where} is not a single text or number", code="E018", where=where)
    dtype = attribute.dtype
    values = np.empty(shape, dtype=dtype)
    attribute.read(values, mtype=h5t.py_create(dtype))
    return values[()]


def _type_code(kind: h5t.TypeID) -> str | None:
    """``f4 f8 i4 i8 u1 str``, or None for a type that an atlas may not hold."""
    if kind.get_class() == h5t.STRING:
        return "str" if kind.is_variable_str() and kind.get_cset() == h5t.CSET_UTF8 else None
    return next((code for code, native in TYPES.items() if kind.equal(native)), None)
