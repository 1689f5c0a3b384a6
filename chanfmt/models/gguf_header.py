"""The header of a GGUF file: its metadata, byte for byte, and where its tensors lie.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A value stays as the bytes of the file until
somebody asks for it, so that the arrays of a tokenizer are copied and not decoded.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import ModelError
from chanfmt.base.text import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
"""Types of metadata values."""
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, BF16 = 0, 1, 2, 3, 6, 7, 8, 30
"""Types of tensors."""
WRITABLE = {"q8_0": Q8_0, "q5_1": Q5_1, "q5_0": Q5_0, "q4_1": Q4_1, "q4_0": Q4_0, "bf16": BF16, "f16": F16, "f32": F32}
"""Types of tensors that can be written, by the names of ``--quant``."""
_ALIGNMENT = "general.alignment"
_MAX_HEADER = 1 << 30
_MAX_TENSORS = 1 << 20
_MAX_AXES = 4
_LONGEST_NAME = 1 << 16


@dataclass(frozen=True)
class Value:
    """A metadata value.

    Attributes:
        kind: Its type, such as `UINT32`.
        raw: Its bytes, without the type.
    """

    kind: int
    raw: bytes = field(repr=False)

    @property
    def content(self) -> Any:
        """The value as Python data: a number, a string, or a list. Text that is not UTF-8 gets replacement characters."""
        return _Cursor(self.raw).value(self.kind)

    @classmethod
    def of(cls, content: float | str, kind: int = UINT32) -> Value:
        """A number of the type ``kind``, or a string."""
        if isinstance(content, str):
            return cls(STRING, _text(content))
        return cls(kind, struct.pack(f"<{_FORMATS[kind]}", content))

    @classmethod
    def array(cls, items: Iterable[float], kind: int = UINT32) -> Value:
        """An array of numbers of the type ``kind``."""
        values = list(items)
        return cls(ARRAY, struct.pack(f"<IQ{len(values)}{_FORMATS[kind]}", kind, len(values), *values))

    @classmethod
    def texts(cls, items: Iterable[str]) -> Value:
        """An array of strings."""
        values = [_text(item) for item in items]
        return cls(ARRAY, struct.pack("<IQ", STRING, len(values)) + b"".join(values))

    @property
    def item_kind(self) -> int:
        """Type of the numbers: that of the items of an array, otherwise the value's own."""
        return struct.unpack_from("<I", self.raw)[0] if self.kind == ARRAY else self.kind


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: Its name.
        shape: Lengths of its axes, the fastest last, as numpy counts them. (The file counts from the fastest.)
        kind: Its type, such as `Q8_0`.
        offset: Offset of its first byte from the start of the data.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int = 0


@dataclass(frozen=True, eq=False)
class Header:
    """What a GGUF file says in front of its tensors.

    Attributes:
        values: Metadata, in the order of the file.
        tensors: The tensors, in the order of the file.
        data: Offset of the first tensor's data from the start of the file.
    """

    values: Mapping[str, Value]
    tensors: Mapping[str, StoredTensor]
    data: int

    @property
    def alignment(self) -> int:
        """Number of bytes that the offset of every tensor is a multiple of."""
        return int(self.number(_ALIGNMENT) or 32)

    def number(self, name: str) -> int | None:
        """The integer called ``name``; None if there is none."""
        value = self.values.get(name)
        content = value.content if value is not None and value.kind not in (STRING, ARRAY) else None
        return content if isinstance(content, int) and not isinstance(content, bool) else None

    def text(self, name: str) -> str:
        """The string called ``name``; empty if there is none."""
        value = self.values.get(name)
        return str(value.content) if value is not None and value.kind == STRING else ""


def read_header(path: Path) -> Header:
    """Read the header of the GGUF file ``path``.

    Raises:
        ModelError: It is not a GGUF file of version 2 or 3, its header is damaged, or it cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            # The length of the header is not stored anywhere.
            length = 1 << 22
            while True:
                file.seek(0)
                try:
                    header = _parsed(file.read(length))
                except _TruncatedError:
                    if length >= min(size, _MAX_HEADER):
                        raise ValueError("it ends too early") from None
                    length *= 4
                    continue
                break
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, OverflowError, RecursionError, struct.error) as error:
        raise ModelError(f"{path} is not a GGUF file that can be read: {error}") from None
    for tensor in header.tensors.values():
        if header.data + tensor.offset > size:
            raise ModelError(f"{path} is shorter than its header says: {one_line(tensor.name)} lies behind its end")
    return header


def header_bytes(values: Mapping[str, Value], tensors: Iterable[StoredTensor], alignment: int) -> bytes:
    """The bytes of a header, up to the first tensor's data."""
    found = list(tensors)
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(found), len(values))]
    for name, value in values.items():
        parts += [_text(name), struct.pack("<I", value.kind), value.raw]
    for tensor in found:
        shape = tensor.shape[::-1]
        parts += [
            _text(tensor.name),
            struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.kind, tensor.offset),
        ]
    whole = b"".join(parts)
    return whole + bytes(-len(whole) % alignment)


class _TruncatedError(Exception):
    """More bytes of the file are needed."""


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise _TruncatedError
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, kind: str) -> tuple[Any, ...]:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))

    def name(self) -> str:
        (length,) = self.unpack("<Q")
        if length > _LONGEST_NAME:
            raise ValueError("a name is too long")
        return self.take(length).decode("utf-8", "replace")

    def skip(self, kind: int, depth: int = 0) -> None:
        if kind == STRING:
            (length,) = self.unpack("<Q")
            if length > _MAX_HEADER:
                raise ValueError("a text is too long")
            self.take(length)
        elif kind == ARRAY:
            item, count = self.unpack("<IQ")
            if count > _MAX_HEADER or depth > 2:
                raise ValueError("an array is too large")
            if item in _FORMATS:
                self.take(count * struct.calcsize(f"<{_FORMATS[item]}"))
            else:
                for _ in range(count):
                    self.skip(item, depth + 1)
        elif kind in _FORMATS:
            self.take(struct.calcsize(f"<{_FORMATS[kind]}"))
        else:
            raise ValueError("a value has an unknown type")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.take(self.unpack("<Q")[0]).decode("utf-8", "replace")
        if kind == ARRAY:
            item, count = self.unpack("<IQ")
            if item in _FORMATS:
                return list(self.unpack(f"<{count}{_FORMATS[item]}"))
            return [self.value(item) for _ in range(count)]
        return self.unpack(f"<{_FORMATS[kind]}")[0]


def _parsed(data: bytes) -> Header:
    cursor = _Cursor(data)
    magic, version, tensors, pairs = cursor.unpack("<4sIQQ")
    if magic != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, and 2 and 3 are known")
    if tensors > _MAX_TENSORS or pairs > _MAX_TENSORS:
        raise ValueError("its header names too many tensors or values")
    values: dict[str, Value] = {}
    for _ in range(pairs):
        name = cursor.name()
        (kind,) = cursor.unpack("<I")
        start = cursor.at
        cursor.skip(kind)
        if name in values:
            raise ValueError(f"it has {one_line(name)} twice")
        values[name] = Value(kind, data[start : cursor.at])
    found: dict[str, StoredTensor] = {}
    for _ in range(tensors):
        name = cursor.name()
        (axes,) = cursor.unpack("<I")
        if axes > _MAX_AXES:
            raise ValueError(f"the tensor {one_line(name)} has too many axes")
        shape = cursor.unpack(f"<{axes}Q")
        kind, offset = cursor.unpack("<IQ")
        if name in found:
            raise ValueError(f"it has the tensor {one_line(name)} twice")
        if math.prod(shape) >= 1 << 62:
            raise ValueError(f"the tensor {one_line(name)} is too large")
        found[name] = StoredTensor(name, shape[::-1], kind, offset)
    header = Header(values, found, 0)
    alignment = header.alignment
    if not 1 <= alignment <= 1 << 20:
        raise ValueError("its alignment is not possible")
    return Header(values, found, -(-cursor.at // alignment) * alignment)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded
