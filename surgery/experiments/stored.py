"""The JSON file of an experiment's rows, read strictly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from chanfmt.base.inputs import file_size
from chanfmt.base.parsed import check_type, parse_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

MAX_BYTES = 1 << 30
"""Size of the largest file that is read."""

Cell = str | int | float | bool | None


class Stored(msgspec.Struct):
    """Content of the file.

    Attributes:
        format: Name and version of the kind of experiment.
        identity: What all rows have in common.
        rows: Column to value.
    """

    format: str
    identity: dict[str, Any]
    rows: list[dict[str, Any]]


class _Measured(msgspec.Struct):
    """The columns that every row has, with their types. See `surgery.experiments.columns`."""

    perplexity: float | None
    nll: float
    standard_error: float | None
    tokens: int
    seconds: float
    block_nll: list[float]
    block_predicted: list[int]
    channels_sha256: str


def read_stored(path: Path) -> Stored:
    """Read the file at ``path``. The columns of its rows are not checked yet.

    Raises:
        ValueError: The file is not JSON, or a type is wrong.
        OSError: The file cannot be read.
    """
    if file_size(path) > MAX_BYTES:
        raise ValueError(f"the file is larger than {MAX_BYTES >> 20} MB")
    return parse_json(path.read_bytes(), Stored)


def check_rows(rows: Sequence[dict[str, Any]], columns: Iterable[str]) -> None:
    """Raise ValueError if a row lacks a column or has a value of the wrong type.

    Args:
        columns: Columns that every row must have besides the columns of all experiments. Their values are numbers, text or
            null.
    """
    names = tuple(columns)
    for number, row in enumerate(rows):
        try:
            _check_row(row, names)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None


def _check_row(row: dict[str, Any], names: tuple[str, ...]) -> None:
    measured = check_type(row, _Measured)
    if not measured.block_nll or len(measured.block_nll) != len(measured.block_predicted):
        raise ValueError(f"it has {len(measured.block_nll)} losses for {len(measured.block_predicted)} blocks")
    for name in names:
        if name not in row:
            raise ValueError(f"it lacks the column {name!r}")
    check_type([row[name] for name in names], list[Cell])
