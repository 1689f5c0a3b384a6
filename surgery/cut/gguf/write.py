"""Write a GGUF file as its layout says, a few rows at a time."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.models.gguf_header import F32, header_bytes
from surgery.cut.gguf.layout import (
    dequantised,
    matrix_shape,
    quantised,
    row_bytes,
    row_runs,
    span,
    taken,
    tensor_bytes,
)
from surgery.cut.gguf.stored import float_rows, stored_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from chanfmt.models.gguf_header import Header, Value
    from chanfmt.models.safetensors import CheckpointIndex
    from surgery.cut.gguf.layout import GgufLayout, Part, TensorLayout

_CHUNK = 4 << 20
"""Bytes of a run of rows."""


def write_gguf(
    source: Path | None,
    header: Header,
    layout: GgufLayout,
    values: Mapping[str, Value],
    after: CheckpointIndex,
    target: Path,
    advance: Callable[[int], object] = lambda count: None,
) -> float:
    """Write the GGUF file ``target``, which does not exist.

    Args:
        source: The source file, with ``header``; None if every tensor comes from ``after``.
        values: Metadata of the result.
        after: The cut checkpoint, in float32.
        advance: Called with the number of bytes just written.

    Returns:
        Relative error of the numbers of the cut that were quantised again: the root of the mean squared error over that of
        the mean square. 0 if there are none.

    Raises:
        ModelError: A file is shorter than its header says, or a number is too large for its type.
        OSError: The file cannot be written.
    """
    error = power = 0.0
    with open(target, "xb") as file:
        file.write(header_bytes(values, [item.target for item in layout.tensors], header.alignment))
        for item in layout.tensors:
            for data, wanted in _rows(source, header, item, after):
                if wanted is not None:
                    back = dequantised(data, item.target.kind).astype(np.float64)
                    error += float(np.square(back - wanted).sum())
                    power += float(np.square(wanted, dtype=np.float64).sum())
                file.write(data.data)
                advance(data.nbytes)
            file.write(bytes(-tensor_bytes(item.target) % header.alignment))
        file.flush()
        os.fsync(file.fileno())
    return math.sqrt(error / power) if power else 0.0


def _rows(
    source: Path | None, header: Header, item: TensorLayout, after: CheckpointIndex
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Runs of the tensor's new rows, uint8 (row, byte), with the numbers that were quantised, or None for copied bytes."""
    if item.values is not None:
        yield item.values.astype("<f4")[None].view(np.uint8), None
        return
    matrices, rows, columns = matrix_shape(item.source)
    size = row_bytes(item.source.kind, columns)
    step = max(1, _CHUNK // max(size, 4 * columns))
    if not item.parts:
        assert source is not None
        # The rows of all matrices follow each other.
        for number in range(matrices):
            for start in range(0, rows, step):
                stored = stored_rows(source, header, item.source, number, start, min(start + step, rows), size)
                if item.copied:
                    yield stored, None
                else:
                    yield quantised(dequantised(stored, item.source.kind), item.target.kind), None
        return
    for number, part in enumerate(item.parts):
        if item.copied:
            assert source is not None
            for places, _, _ in row_runs(part, rows, step):
                low, high = span(places)
                stored = stored_rows(source, header, item.source, number, low, high, size)
                # A block of zero bytes holds zeros in every type.
                yield taken(stored, np.where(places < 0, -1, places - low)), None
        else:
            yield from _quantised(part, item, after)


def _quantised(part: Part, item: TensorLayout, after: CheckpointIndex) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    _, rows, columns = matrix_shape(item.target)
    whole = part.transposed or part.order is not None
    step = rows if whole else max(1, _CHUNK // (4 * columns))
    for start in range(0, rows, step):
        wanted = float_rows(after.tensors[part.tensor], start, min(start + step, rows), transposed=part.transposed)
        if part.order is not None:
            wanted = wanted[part.order]
        if part.shift:
            wanted = wanted + np.float32(part.shift)
        if item.target.kind == F32:
            yield wanted.view(np.uint8), None
        else:
            yield quantised(wanted, item.target.kind), wanted
