"""Decide how every tensor of a GGUF file is written after a cut: which rows are copied, and what is quantised again.

A row of a quantised matrix is whole blocks, so a row that stays is copied bit for bit. A cut of the columns goes through
blocks, so the numbers of that matrix are quantised again. The fallbacks of types follow llama.cpp's quantiser.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.algebra.gguf_names import gguf_package, tensor_name, tensor_names
from chanfmt.base.errors import ModelError
from chanfmt.base.text import one_line
from chanfmt.models.gguf_header import F16, F32, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, WRITABLE
from surgery.cut.gguf.stored import float_rows, stored_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from chanfmt.models.gguf_header import Header, StoredTensor
    from chanfmt.models.safetensors import CheckpointIndex
    from surgery.cut.checkpoint.cuts import Cut
    from surgery.planning.plan import PruningPlan

PURPOSE = "writing a GGUF file"
_SHORT = (Q4_0, Q4_1, Q5_0, Q5_1)
_AGAIN = {Q4_0: Q5_0, Q4_1: Q5_0}
"""Type to the type that takes its place in a matrix that is quantised again: four bits lose much the second time."""
_KEPT_PRECISE = re.compile(
    r"_norm\.|ffn_gate_inp\.|position_embd|token_types|altup|laurel|per_layer_model_proj|ssm_conv1d|shortconv\.conv|"
    r"time_mix_|attn_rel_b|\.bias$"
)
"""Tensors that llama.cpp's quantiser leaves as they are."""
_SAMPLED = 64
"""Rows that prove that a tensor of the file is a tensor of the checkpoint."""


@dataclass(frozen=True, eq=False)
class Part:
    """A matrix of a tensor: that of one expert, or the only one.

    Attributes:
        tensor: Its name in the checkpoint.
        transposed: Whether the checkpoint holds its columns as rows (Conv1D).
        axis: Axis that is cut, 0 for rows and 1 for columns; None if none is.
        positions: For every new position on that axis the old position, or -1 for zeros, int64; None if none is cut.
        order: Row of the checkpoint's matrix that each row of the file's comes from; None if the rows have the same order.
        shift: What is added to every number.
    """

    tensor: str
    transposed: bool
    axis: int | None
    positions: np.ndarray | None
    order: np.ndarray | None = None
    shift: float = 0.0


@dataclass(frozen=True, eq=False)
class TensorLayout:
    """How one tensor is written.

    Attributes:
        source: The tensor in the source file.
        target: The tensor in the result; its offset is set when the file is laid out.
        parts: Its matrices, if it belongs to an FFN that is cut; otherwise empty.
        copied: Whether its bytes, or the bytes of the rows that stay, are copied.
        values: Its numbers, float32, if they are in neither file; otherwise None.
    """

    source: StoredTensor
    target: StoredTensor
    parts: tuple[Part, ...]
    copied: bool
    values: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class GgufLayout:
    """How a GGUF file is written.

    Attributes:
        tensors: Every tensor, in the order of the file.
        nbytes: Bytes of all tensors, without the spaces between them.
        notes: What is not as asked, in sentences without a full stop.
    """

    tensors: tuple[TensorLayout, ...]
    nbytes: int
    notes: tuple[str, ...]

    @property
    def kinds(self) -> dict[str, int]:
        """Name of each type to the number of its tensors, the most frequent first."""
        return dict(Counter(kind_name(item.target.kind) for item in self.tensors).most_common())


def lay_out(
    path: Path,
    header: Header,
    plan: PruningPlan,
    cuts: Mapping[str, Cut],
    before: CheckpointIndex,
    after: CheckpointIndex,
    *,
    quant: str | None = None,
    cut_quant: str | None = None,
    refitted: bool = False,
) -> GgufLayout:
    """Decide how the result of a cut is written.

    Args:
        path: The source file, with ``header``.
        cuts: Name of every tensor of the checkpoint that is cut to its cut.
        before: The dequantised checkpoint of the source file, in float32.
        after: The checkpoint after the cut, in float32.
        quant: Type of all matrices, one of `WRITABLE`; None to keep their types.
        cut_quant: Type of the matrices that are quantised again because numbers of them are cut or changed, one of `WRITABLE`; None
            for ``quant``, or without that for their own types, and Q5_0 in place of four bits.
        refitted: Whether numbers of ``after`` may differ from those of ``before``.

    Raises:
        ModelError: llama.cpp has no place for a tensor of the result, or the file and the checkpoint differ.
        MissingPackageError: The package gguf is not installed.
    """
    if new := sorted(after.tensors.keys() - before.tensors.keys()):
        raise ModelError(
            f"the recovery adds the tensor {one_line(new[0])}, for which the GGUF file has no place",
            hint="use --recover lstsq, block or distill, or leave out --format gguf",
        )
    places = places_of(header, plan)
    notes: Counter[str] = Counter()
    found = []
    for tensor in header.tensors.values():
        parts = tuple(_part(path, header, tensor, number, name, cuts, before) for number, name in enumerate(places[tensor.name]))
        shape = _shape(tensor, parts)
        same = all(part.axis != 1 for part in parts) and not (refitted and _changed(parts, before, after))
        kind, note = target_kind(header, tensor, shape[-1], same=same, quant=quant, cut_quant=cut_quant)
        if note:
            notes[note] += 1
        copied = same and kind == tensor.kind
        if not copied and kind == tensor.kind == F32 and not parts:
            copied = True
        found.append(TensorLayout(tensor, replace(tensor, shape=shape, kind=kind), parts, copied))
    return placed(found, header.alignment, notes)


def kind_name(kind: int) -> str:
    """Name of a type, such as ``Q8_0``. Raises `ModelError` for an unknown type."""
    gguf = gguf_package(PURPOSE)
    try:
        return str(gguf.GGMLQuantizationType(kind).name)
    except ValueError:
        raise ModelError(f"the GGUF file has tensors of the type {kind}, which the package gguf does not know") from None


def row_bytes(kind: int, columns: int) -> int:
    """Bytes of a row of ``columns`` numbers. Raises `ModelError` if it is not whole blocks."""
    block, size = block_of(kind)
    if columns % block:
        raise ModelError(f"a row of {columns} numbers is not whole blocks of {kind_name(kind)}")
    return columns // block * size


def block_of(kind: int) -> tuple[int, int]:
    """Numbers and bytes of a block."""
    gguf = gguf_package(PURPOSE)
    kind_name(kind)
    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    return int(numbers), int(size)


def bytes_of(quant: str) -> float:
    """Bytes of a number in the type ``quant``, one of `WRITABLE`."""
    numbers, size = block_of(WRITABLE[quant])
    return size / numbers


def architecture(header: Header) -> str:
    """Name of the model's architecture. Raises `ModelError` if the file does not say it."""
    found = header.text("general.architecture")
    if not found:
        raise ModelError("the GGUF file does not name its architecture")
    return found


def matrix_shape(tensor: StoredTensor) -> tuple[int, int, int]:
    """Matrices, rows and columns of a tensor; a vector is one row."""
    shape = (1, 1, *tensor.shape)
    outer = int(np.prod(shape[:-2], dtype=np.int64))
    return outer, shape[-2], shape[-1]


def places_of(header: Header, plan: PruningPlan) -> defaultdict[str, list[str]]:
    """Name of every tensor of an FFN that is cut to the tensors of the checkpoint that it holds, expert by expert.

    Raises:
        ModelError: llama.cpp does not know the architecture, or the file has no place for a tensor.
        MissingPackageError: The package gguf is not installed.
    """
    kind = architecture(header)
    names = tensor_names(kind, 1 + max(block.layer_index for block in plan.blocks), PURPOSE)
    if names is None:
        raise ModelError(
            f"the package gguf does not know the architecture {one_line(kind)}", hint="update it: pip install -U gguf"
        )
    found: defaultdict[str, list[str]] = defaultdict(list)
    for block in plan.blocks:
        for tensor in dict.fromkeys(item.tensor for item in block.tensors) if block.is_cut else ():
            name = tensor_name(names, tensor)
            if name is None or name not in header.tensors:
                raise ModelError(f"the GGUF file has no place for {one_line(tensor)}", hint="leave out --format gguf")
            found[name].append(tensor)
    return found


def _part(
    path: Path,
    header: Header,
    tensor: StoredTensor,
    number: int,
    name: str,
    cuts: Mapping[str, Cut],
    before: CheckpointIndex,
) -> Part:
    entry = before.tensors.get(name)
    if entry is None or entry.dtype != "F32":
        raise ModelError(
            f"{one_line(name)} of the dequantised model is not stored as float32", hint="clear it with: atlas cache clear"
        )
    _, rows, columns = matrix_shape(tensor)
    count = min(rows, _SAMPLED)
    values = dequantised(stored_rows(path, header, tensor, number, 0, count, row_bytes(tensor.kind, columns)), tensor.kind)
    transposed = None
    for turned in (False, True):
        expected = (entry.shape[::-1] if turned else entry.shape) if len(entry.shape) > 1 else (1, *entry.shape)
        if expected == (rows, columns) and np.array_equal(values, float_rows(entry, 0, count, transposed=turned)):
            transposed = turned
            break
    if transposed is None:
        raise ModelError(
            f"{one_line(tensor.name)} of the GGUF file is not {one_line(name)} of the model as transformers reads it",
            hint="leave out --format gguf",
        )
    cut = cuts.get(name)
    if cut is None:
        return Part(name, transposed, None, None)
    if cut.by_expert:
        raise ModelError(f"{one_line(name)} holds several experts, and their order in a GGUF file is unknown")
    axis = 1 if len(entry.shape) == 1 else cut.axis
    return Part(name, transposed, 1 - axis if transposed else axis, cut.positions[0])


def dequantised(data: np.ndarray, kind: int) -> np.ndarray:
    """The numbers of ``data``, rows of bytes of the type ``kind``: float32 (row, column). Raises `ModelError`."""
    gguf = gguf_package(PURPOSE)
    try:
        found: np.ndarray = gguf.quants.dequantize(np.ascontiguousarray(data), gguf.GGMLQuantizationType(kind))
    except NotImplementedError:
        raise ModelError(f"the package gguf cannot read the type {kind_name(kind)}") from None
    return found.astype(np.float32, copy=False)


def quantised(values: np.ndarray, kind: int) -> np.ndarray:
    """``values``, float32 (row, column), as rows of bytes of the type ``kind``.

    Raises:
        ModelError: A number is too large for the type.
    """
    gguf = gguf_package(PURPOSE)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        found: np.ndarray = gguf.quants.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType(kind))
        back = dequantised(found.view(np.uint8).reshape(len(values), -1), kind)
    if not np.isfinite(back).all():
        raise ModelError(f"a weight is too large for {kind_name(kind)}", hint="use --quant bf16 or f32")
    return found.view(np.uint8).reshape(len(values), -1)


def _shape(tensor: StoredTensor, parts: Sequence[Part]) -> tuple[int, ...]:
    """Shape of the tensor in the result."""
    if not parts:
        return tensor.shape
    matrices, rows, columns = matrix_shape(tensor)
    if matrices != len(parts):
        raise ModelError(f"{one_line(tensor.name)} holds {matrices} matrices, and the plan has {len(parts)} for it")
    lengths = {(part.axis, None if part.positions is None else len(part.positions)) for part in parts}
    if len(lengths) > 1:
        raise ModelError(f"the experts in {one_line(tensor.name)} would have different widths", hint="leave out --format gguf")
    axis, length = lengths.pop()
    if axis is None or length is None:
        return tensor.shape
    new = (length, columns) if axis == 0 else (rows, length)
    return (*tensor.shape[:-2], *new) if len(tensor.shape) > 1 else new[1:]


def _changed(parts: Sequence[Part], before: CheckpointIndex, after: CheckpointIndex) -> bool:
    """Whether a recovery gave other numbers to rows that stay."""
    for part in parts:
        old, new = before.tensors[part.tensor], after.tensors[part.tensor]
        if part.transposed:
            rows = float_rows(old, 0, old.shape[-1], transposed=True)
            kept = rows if part.positions is None else taken(rows, part.positions)
            if not np.array_equal(kept, float_rows(new, 0, len(kept), transposed=True)):
                return True
            continue
        for places, start, stop in row_runs(part, new.shape[0] if len(new.shape) > 1 else 1):
            low, high = span(places)
            kept = taken(float_rows(old, low, high), np.where(places < 0, -1, places - low))
            if not np.array_equal(kept, float_rows(new, start, stop)):
                return True
    return False


def taken(rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The rows at ``positions``, with zeros at -1."""
    found = rows[np.maximum(positions, 0)] if len(rows) else np.zeros((len(positions), *rows.shape[1:]), rows.dtype)
    found[positions < 0] = 0
    return found


def row_runs(part: Part, rows: int, step: int = 1024) -> Iterator[tuple[np.ndarray, int, int]]:
    """Runs of new rows: the old rows that they come from (-1 for zeros), and their range."""
    positions = np.arange(rows) if part.axis != 0 or part.positions is None else part.positions
    for start in range(0, len(positions), step):
        yield positions[start : start + step], start, min(start + step, len(positions))


def span(positions: np.ndarray) -> tuple[int, int]:
    """The range of old rows that ``positions`` come from; empty if all are zeros."""
    there = positions[positions >= 0]
    return (int(there.min()), int(there.max()) + 1) if len(there) else (0, 0)


def target_kind(
    header: Header, tensor: StoredTensor, columns: int, *, same: bool, quant: str | None, cut_quant: str | None
) -> tuple[int, str]:
    """Type of a tensor in the result, and a note if it is not the type that was asked for.

    Args:
        columns: Numbers in a row of the result.
        same: Whether the rows of the result are rows of the source.
        quant, cut_quant: As for `lay_out`.
    """
    wanted = tensor.kind if quant is None else _asked(header, tensor, quant)
    if not same and len(tensor.shape) > 1:
        if cut_quant is not None:
            wanted = WRITABLE[cut_quant]
        elif quant is None:
            wanted = _AGAIN.get(wanted, wanted)
    if same and wanted == tensor.kind:
        return wanted, ""
    name = kind_name(wanted)
    if wanted not in WRITABLE.values():
        note = f"{name} can be read and not written, so what is quantised again becomes Q8_0"
        wanted = Q8_0
    else:
        note = ""
    block, _ = block_of(wanted)
    if columns % block:
        note = f"a width of {columns} is not a multiple of the block of {block} of {kind_name(wanted)}, so F16 takes its place"
        wanted = F16
    return wanted, note


def _asked(header: Header, tensor: StoredTensor, quant: str) -> int:
    """Type of a tensor if all matrices have the type ``quant``, as llama.cpp's quantiser decides."""
    kind = WRITABLE[quant]
    if len(tensor.shape) < 2 or _KEPT_PRECISE.search(tensor.name):
        return tensor.kind
    output = "output.weight" if "output.weight" in header.tensors else "token_embd.weight"
    return Q8_0 if kind in _SHORT and tensor.name == output else kind


def placed(found: Sequence[TensorLayout], alignment: int, notes: Mapping[str, int], more: str = "") -> GgufLayout:
    """``found`` with offsets in the result.

    Args:
        notes: What is not as asked, and of how many tensors.
        more: Another note; empty for none.
    """
    position = total = 0
    placed = []
    for item in found:
        target = replace(item.target, offset=position)
        size = tensor_bytes(target)
        total += size
        position += size + -size % alignment
        placed.append(replace(item, target=target))
    said = [f"{text} ({count} tensors)" for text, count in notes.items()]
    return GgufLayout(tuple(placed), total, (*said, *([more] if more else ())))


def tensor_bytes(tensor: StoredTensor) -> int:
    """Bytes of a tensor. Raises `ModelError` if its rows are not whole blocks."""
    matrices, rows, columns = matrix_shape(tensor)
    return matrices * rows * row_bytes(tensor.kind, columns)
