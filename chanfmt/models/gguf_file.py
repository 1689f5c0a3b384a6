"""What a GGUF file holds, in words: its size, and the bits of its weights.

Only the header is read: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The ``gguf`` package takes seconds for that,
because it makes a Python object of every token.
"""

from __future__ import annotations

import math
import re
import struct
from collections import defaultdict
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from pathlib import Path

_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the fixed types of a header's values."""
_TEXT, _ARRAY = 8, 9
_LONGEST = 1 << 20


def describe(path: Path) -> str:
    """Size and main type of the weights of a GGUF file, such as ``98 MB of 4-bit weights (Q4_1)``.

    The main type is that of the largest share of the numbers. If the header cannot be read, only the size is given.
    """
    size = f"{path.stat().st_size / 1e6:,.0f} MB"
    try:
        with path.open("rb") as file:
            elements = _elements(file)
    except (OSError, ValueError, OverflowError, RecursionError, struct.error):
        return size
    if not elements:
        return size
    kind = max(elements, key=lambda name: elements[name])
    bits = int(re.findall(r"\d+", kind)[0])
    return f"{size} of {bits}-bit weights ({kind})"


def _elements(file: BinaryIO) -> dict[str, int]:
    """Type of tensors to the number of their elements. Raises ValueError or `struct.error` for another kind of file."""
    magic, version, tensors, pairs = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF" or not 2 <= version <= 3:
        raise ValueError("not a GGUF file")
    for _ in range(pairs):
        _skip_text(file)
        _skip_value(file, _number(file, "<I"))
    found: dict[str, int] = defaultdict(int)
    for _ in range(tensors):
        _skip_text(file)
        rank = _number(file, "<I")
        if rank > 8:
            raise ValueError("a tensor has too many axes")
        shape = struct.unpack(f"<{rank}Q", file.read(8 * rank))
        kind = _number(file, "<I")
        if kind not in _TYPES:
            raise ValueError("a tensor has an unknown type")
        found[_TYPES[kind]] += math.prod(shape)
        file.seek(8, 1)
    return found


def _skip_value(file: BinaryIO, kind: int) -> None:
    if kind == _TEXT:
        _skip_text(file)
    elif kind == _ARRAY:
        item, count = struct.unpack("<IQ", file.read(12))
        if item in _SIZES:
            file.seek(_SIZES[item] * count, 1)
        else:
            for _ in range(count):
                _skip_value(file, item)
    elif kind in _SIZES:
        file.seek(_SIZES[kind], 1)
    else:
        raise ValueError("a value has an unknown type")


def _skip_text(file: BinaryIO) -> None:
    length = _number(file, "<Q")
    if length > _LONGEST:
        raise ValueError("a text is too long")
    file.seek(length, 1)


def _number(file: BinaryIO, kind: str) -> int:
    return struct.unpack(kind, file.read(struct.calcsize(kind)))[0]
