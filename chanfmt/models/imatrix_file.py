"""llama.cpp's importance matrices as files: the GGUF layout, and the older one that ends in ``.dat``.

Both hold, for each weight, the mean squared input that the weight multiplies. The GGUF layout has sums and counts of tokens,
``NAME.in_sum2`` (matrix, input) and ``NAME.counts`` (matrix, 1), with a matrix per expert. The older layout is a list of names,
each with a number of calls and the means times that number, all matrices behind each other; it does not count tokens.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from chanfmt.base.errors import UsageError
from chanfmt.base.inputs import file_size
from chanfmt.base.text import one_line
from chanfmt.models.gguf_header import F32, STRING, Header, StoredTensor, read_header

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SUMS, COUNTS = ".in_sum2", ".counts"
TYPE = "imatrix"
PURPOSE = "an importance matrix of llama.cpp"
"""What needs the package gguf, in errors."""
_CHUNKS, _CHUNK_SIZE, _DATASETS = "imatrix.chunk_count", "imatrix.chunk_size", "imatrix.datasets"
_MAX_BYTES = 1 << 32
_MAX_NAME, _MAX_ENTRIES = 1 << 12, 1 << 17
_HINT = "name a file that llama-imatrix or atlas export wrote"


@dataclass(frozen=True, eq=False)
class ImatrixEntry:
    """The importance of one weight.

    Attributes:
        sums: Sums of the squared inputs, float64 (matrix, input).
        counts: Tokens of each matrix, float64 (matrix,).
    """

    sums: np.ndarray
    counts: np.ndarray

    def by_expert(self, experts: int, width: int) -> ImatrixEntry:
        """The same with a matrix for each of ``experts``, if all of them lie behind each other, as in the older layout."""
        if len(self.sums) != 1 or self.sums.size != experts * width:
            return self
        return ImatrixEntry(self.sums.reshape(experts, width), np.repeat(self.counts, experts))


@dataclass(frozen=True, eq=False)
class Imatrix:
    """An importance matrix.

    Attributes:
        entries: Name of each weight, such as ``blk.0.ffn_down.weight``, to its importance.
        datasets: Names of the texts.
        chunks: Number of chunks of text; 0 if the file does not say it.
        chunk_size: Tokens of a chunk.
        counted: Whether the counts are tokens. In the older layout they are chunks times `chunk_size`.
    """

    entries: Mapping[str, ImatrixEntry]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int
    counted: bool


def read_imatrix(path: Path, chunk_size: int = 512) -> Imatrix:
    """Read an importance matrix in either layout.

    Args:
        chunk_size: Tokens of a chunk, which the older layout does not say. It changes counts, and no mean.

    Raises:
        UsageError: The file does not exist, is not an importance matrix, or holds impossible numbers.
        ModelError: It is a damaged GGUF file.
    """
    if chunk_size < 1:
        raise UsageError(f"--chunk-size must be at least 1, not {chunk_size}")
    try:
        if file_size(path) > _MAX_BYTES:
            raise UsageError(f"{path} is larger than {_MAX_BYTES >> 30} GiB, and is not an importance matrix", hint=_HINT)
        with path.open("rb") as file:
            found = _read_gguf(path) if file.read(4) == b"GGUF" else _read_dat(path, file, chunk_size)
    except FileNotFoundError:
        raise UsageError(f"the importance matrix {path} does not exist") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    for name, entry in found.entries.items():
        if not (np.isfinite(entry.sums).all() and np.isfinite(entry.counts).all()):
            raise UsageError(f"{path}: {one_line(name)} holds a number that is not finite", hint="compute the matrix again")
        if (entry.sums < 0).any() or (entry.counts < 0).any():
            raise UsageError(f"{path}: {one_line(name)} holds a negative number, and squares have none", hint=_HINT)
    return found


def _read_gguf(path: Path) -> Imatrix:
    header = read_header(path)
    if header.text("general.type") != TYPE:
        kind = header.text("general.architecture")
        what = f"is a model of the architecture {one_line(kind)}" if kind else "does not say that it is an importance matrix"
        raise UsageError(f"{path} {what}", hint=_HINT)
    names = [name.removesuffix(SUMS) for name in header.tensors if name.endswith(SUMS)]
    if lost := [name for name in header.tensors if not name.endswith((SUMS, COUNTS))]:
        raise UsageError(f"{path} holds the tensor {one_line(lost[0])}, which an importance matrix does not have", hint=_HINT)
    entries = {}
    for name in names:
        if name + COUNTS not in header.tensors:
            raise UsageError(f"{path} has no counts for {one_line(name)}", hint="compute the matrix again")
        sums, counts = (_array(path, header, header.tensors[name + part]) for part in (SUMS, COUNTS))
        sums = np.atleast_2d(sums)
        counts = counts.reshape(-1)
        if sums.ndim != 2 or len(counts) != len(sums):
            raise UsageError(
                f"{path}: {one_line(name)} has sums of shape {list(sums.shape)} and {len(counts)} counts", hint=_HINT
            )
        entries[name] = ImatrixEntry(sums, counts)
    value = header.values.get(_DATASETS)
    content = value.content if value is not None else []
    texts = tuple(one_line(str(item)) for item in content) if isinstance(content, list) else ()
    if value is not None and value.kind == STRING:
        texts = (one_line(str(content)),)
    return Imatrix(entries, texts, header.number(_CHUNKS) or 0, header.number(_CHUNK_SIZE) or 0, True)


def _array(path: Path, header: Header, tensor: StoredTensor) -> np.ndarray:
    if tensor.kind != F32:
        raise UsageError(f"{path}: {one_line(tensor.name)} is not stored as float32", hint=_HINT)
    count = int(np.prod(tensor.shape, dtype=np.int64))
    if count < 1 or count > _MAX_BYTES // 4:
        raise UsageError(f"{path}: {one_line(tensor.name)} has the shape {list(tensor.shape)}", hint=_HINT)
    values = np.fromfile(path, dtype="<f4", count=count, offset=header.data + tensor.offset)
    if len(values) < count:
        raise UsageError(f"{path} is shorter than its header says", hint="copy the file again")
    return values.astype(np.float64).reshape(tensor.shape)


def _read_dat(path: Path, file: BinaryIO, chunk_size: int) -> Imatrix:
    file.seek(0)
    entries = {}
    try:
        (count,) = _numbers(file, 1)
        if not 1 <= count <= _MAX_ENTRIES:
            raise ValueError
        for _ in range(count):
            name = _name(file)
            calls, length = _numbers(file, 2)
            if calls < 1 or not 1 <= length <= _MAX_BYTES // 4:
                raise ValueError
            data = file.read(4 * length)
            if len(data) < 4 * length or name in entries:
                raise ValueError
            means = np.frombuffer(data, dtype="<f4").astype(np.float64) / calls
            tokens = calls * chunk_size
            entries[name] = ImatrixEntry(means[None] * tokens, np.array([tokens], dtype=np.float64))
        rest = file.read(8 + _MAX_NAME)
    except (ValueError, struct.error):
        raise UsageError(f"{path} is not an importance matrix of llama.cpp, or is damaged", hint=_HINT) from None
    chunks = 0
    texts: tuple[str, ...] = ()
    # Files of the first versions end after the entries.
    if len(rest) >= 8:
        chunks, length = struct.unpack_from("<ii", rest)
        texts = (one_line(rest[8 : 8 + max(0, length)].decode("utf-8", "replace")),)
    most = max(int(entry.counts[0]) for entry in entries.values()) // chunk_size
    return Imatrix(entries, texts, chunks if chunks > 0 else most, chunk_size, False)


def _name(file: BinaryIO) -> str:
    (length,) = _numbers(file, 1)
    if not 1 <= length <= _MAX_NAME:
        raise ValueError
    return file.read(length).decode("utf-8")


def _numbers(file: BinaryIO, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}i", file.read(4 * count))
