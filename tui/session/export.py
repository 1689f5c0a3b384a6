"""Write what a table shows as csv, json or npy; the file's extension decides."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.errors import UsageError
from chanfmt.base.files import atomic_file, check_target
from chanfmt.base.text import spreadsheet_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FORMATS = (".csv", ".json", ".npy")


def write_table(path: Path, columns: Mapping[str, np.ndarray]) -> int:
    """Write ``columns``, name to values (row,), to the new file ``path``; return the number of rows.

    csv: one line per row; the cell of an unknown value is empty. json: a list of objects; an unknown value is null.
    npy: a structured array; an unknown value is NaN. Numbers read back as the same bits.

    Raises:
        UsageError: The extension is not one of `FORMATS`, or ``path`` exists or cannot be written.
        ChanfmtError: The disk is full.
    """
    write = {".csv": _csv, ".json": _json, ".npy": _npy}.get(path.suffix.lower())
    if write is None:
        raise UsageError(f"cannot tell the format from {path.name!r}", hint=f"use a name that ends in {', '.join(FORMATS)}")
    check_target(path, overwrite=False)
    data = write(columns)
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)
    return len(next(iter(columns.values())))


def _csv(columns: Mapping[str, np.ndarray]) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*([_cell(value) for value in values] for values in columns.values()), strict=True))
    return stream.getvalue().encode()


def _cell(value: np.generic) -> str:
    if isinstance(value, np.floating):
        return "" if np.isnan(value) else str(value)
    text = str(value)
    return spreadsheet_text(text) if isinstance(value, np.str_) else text


def _json(columns: Mapping[str, np.ndarray]) -> bytes:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*map(_plain, columns.values()), strict=True)]
    return (json.dumps(rows, allow_nan=False, indent=0) + "\n").encode()


def _plain(values: np.ndarray) -> list[object]:
    if values.dtype.kind != "f":
        return list(values.tolist())
    # The shortest text of a float32 is shorter than the shortest text of the same value in float64.
    return [float(str(value)) if math.isfinite(value) else None for value in values]


def _npy(columns: Mapping[str, np.ndarray]) -> bytes:
    rows = len(next(iter(columns.values())))
    table = np.empty(rows, dtype=[(name, values.dtype) for name, values in columns.items()])
    for name, values in columns.items():
        table[name] = values
    stream = io.BytesIO()
    np.save(stream, table, allow_pickle=False)
    return stream.getvalue()
