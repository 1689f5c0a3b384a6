"""Read the numbers of a column from a file of arrays (npy, npz, safetensors) or from a table (csv, parquet, arrow)."""

from __future__ import annotations

import csv
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra.columns import placed, shape_of
from chanfmt.base.errors import MissingPackageError, UsageError, first_line
from chanfmt.base.inputs import file_size
from chanfmt.format.columns import COLUMN_BY_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from chanfmt.format.records import StackData

ARRAYS = (".npy", ".npz", ".safetensors")
TABLES = (".csv", ".parquet", ".arrow")
_KEYS = ("stack", "block", "layer", "expert", "channel", "label")
"""Columns of an exported table that are not values."""
_MOST_BYTES = 1 << 33
"""Bytes of an array at most. An atlas of the largest models has columns of some hundred megabytes."""


def read_column(path: Path, name: str, stacks: Sequence[StackData]) -> dict[str, np.ndarray]:
    """Read the column ``name`` from ``path``.

    A file with one array is that column. In a file with several arrays, the arrays of the column are called
    ``STACK/x_owner/name``, as `atlas export` calls them, or ``x_owner/name``, or ``name``. A table has the columns ``layer`` and
    ``channel``, and ``expert`` and ``stack`` if the atlas needs them; its values are in the column ``x_owner/name`` or
    ``name``, or in the only other column. A channel that no row names is NaN.

    Args:
        stacks: The stacks of the atlas.

    Returns:
        Name of the stack to values (layer[, expert], channel), of the type that the file has.

    Raises:
        UsageError: The file cannot be read, or does not have the column, or the column does not fit the atlas.
        MissingPackageError: The package that reads the file is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in (*ARRAYS, *TABLES):
        raise UsageError(f"cannot tell the format of {path.name!r}", hint=f"a column comes from {', '.join((*ARRAYS, *TABLES))}")
    try:
        size = file_size(path)
        if suffix in TABLES:
            return _from_table(_read_table(path, suffix, name), name, stacks, path)
        if size > _MOST_BYTES:
            raise UsageError(f"{path} has {size / 1e9:.0f} GB, which no column has", hint="save the column alone")
        return _from_arrays(_read_arrays(path, suffix, name, stacks), name, stacks)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or first_line(error)}") from None
    except UsageError as error:
        where = "" if path.name in error.message else f"{path}: "
        raise UsageError(f"{where}{error.message}", hint=error.hint) from None


# Arrays.


def _from_arrays(arrays: dict[str | None, np.ndarray], name: str, stacks: Sequence[StackData]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for stack, values in arrays.items():
        found |= placed(values, name, stacks, stack)
    return found


def _read_arrays(path: Path, suffix: str, name: str, stacks: Sequence[StackData]) -> dict[str | None, np.ndarray]:
    """The arrays of the column in a file: the name of the stack, or None if the shape decides, to the array."""
    if suffix == ".npy":
        try:
            # Mapped, not read: its shape is checked first.
            return {None: np.load(path, mmap_mode="r", allow_pickle=False)}
        except (ValueError, EOFError) as error:
            raise UsageError(f"{path} is not an array: {first_line(error)}", hint="save it with numpy.save") from None
    return _read_npz(path, name, stacks) if suffix == ".npz" else _read_safetensors(path, name, stacks)


def _read_npz(path: Path, name: str, stacks: Sequence[StackData]) -> dict[str | None, np.ndarray]:
    most = 8 * max(int(np.prod(shape_of(stack))) for stack in stacks) + (1 << 16)
    try:
        with np.load(path, allow_pickle=False) as archive:
            chosen = _chosen(archive.files, name, stacks)
            for key in chosen.values():
                # A small archive can hold an array of any size.
                if archive.zip.getinfo(f"{key}.npy").file_size > most:
                    raise UsageError(f"the array {key!r} is larger than any stack of the atlas")
            return {stack: archive[key] for stack, key in chosen.items()}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not an archive of arrays: {first_line(error)}", hint="save it with numpy.savez") from None


def _read_safetensors(path: Path, name: str, stacks: Sequence[StackData]) -> dict[str | None, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            chosen = _chosen(list(file.keys()), name, stacks)
            for key in chosen.values():
                code = file.get_slice(key).get_dtype()
                if code.startswith(("BF", "F8")):
                    raise UsageError(
                        f"the array {key!r} has the type {code}, which numpy does not have", hint="save it as float32"
                    )
            return {stack: file.get_tensor(key) for stack, key in chosen.items()}
    except SafetensorError as error:
        raise UsageError(f"{path} is not a safetensors file: {first_line(error)}") from None


def _chosen(keys: Sequence[str], name: str, stacks: Sequence[StackData]) -> dict[str | None, str]:
    """The keys of the column's arrays. Raises `UsageError` if there are none."""
    own = name.partition("/")[2]
    for ending in (name, own):
        found: dict[str | None, str] = {
            stack.name: f"{stack.name}/{ending}" for stack in stacks if f"{stack.name}/{ending}" in keys
        }
        if found:
            return found
        if ending in keys:
            return {None: ending}
    if len(keys) == 1:
        return {None: keys[0]}
    shown = ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")
    raise UsageError(
        f"none of the {len(keys)} arrays is {name}: {shown or 'there are none'}",
        hint=f"name the array {name}, or {stacks[0].name}/{name} for a stack",
    )


# Tables.


@dataclass(frozen=True)
class _Table:
    """The rows of a table that name channels.

    Attributes:
        values: Numbers (row,); NaN where a cell is empty.
        layer, channel, expert: Integers (row,); ``expert`` is -1 where there is none.
        stack: Names (row,); empty where there is none.
    """

    values: np.ndarray
    layer: np.ndarray
    channel: np.ndarray
    expert: np.ndarray
    stack: np.ndarray


def _read_table(path: Path, suffix: str, name: str) -> _Table:
    if suffix == ".csv":
        return _read_csv(path, name)
    try:
        import pyarrow as arrow
        from pyarrow import feather, parquet
    except ImportError:
        raise MissingPackageError("pyarrow", "", f"reading {suffix.removeprefix('.')}") from None
    try:
        headings = (parquet.read_schema(path) if suffix == ".parquet" else arrow.ipc.open_file(path).schema).names
        value = _value_heading(headings, name)
        wanted = [heading for heading in ("stack", "layer", "expert", "channel", value) if heading in headings]
        table = (parquet if suffix == ".parquet" else feather).read_table(path, columns=wanted)
    except arrow.ArrowException as error:
        raise UsageError(f"{path} is not a table: {first_line(error)}") from None
    columns = {heading: table[heading] for heading in wanted}
    if arrow.types.is_dictionary(columns[value].type) or not arrow.types.is_primitive(columns[value].type):
        raise UsageError(f"the column {value!r} has the type {columns[value].type}, which is not a number")
    rows = table.num_rows

    def integers(heading: str, missing: int | None) -> np.ndarray:
        column = columns.get(heading)
        if column is None:
            return np.full(rows, missing)
        if not arrow.types.is_integer(column.type) or (missing is None and column.null_count):
            raise UsageError(f"the column {heading!r} holds something else than whole numbers")
        return np.asarray(column.fill_null(-1 if missing is None else missing).to_numpy(), dtype=np.int64)

    stack = columns["stack"].cast(arrow.string()).fill_null("").to_pylist() if "stack" in columns else [""] * rows
    values = np.asarray(columns[value].to_numpy())
    return _Table(
        values, integers("layer", None), integers("channel", None), integers("expert", -1), np.array(stack, dtype=object)
    )


def _read_csv(path: Path, name: str) -> _Table:
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            headings = [heading.strip() for heading in next(reader, [])]
            value = _value_heading(headings, name)
            places = {
                heading: headings.index(heading)
                for heading in ("stack", "layer", "expert", "channel", value)
                if heading in headings
            }
            cells: dict[str, list[str]] = {heading: [] for heading in places}
            lines = []
            for row in reader:
                if not row:
                    continue
                if len(row) != len(headings):
                    raise UsageError(f"line {reader.line_num} has {len(row)} cells, and the header has {len(headings)}")
                lines.append(reader.line_num)
                for heading, place in places.items():
                    cells[heading].append(row[place].strip())
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is not a table in UTF-8: {first_line(error)}") from None

    def numbers(heading: str, kind: Any, missing: str | None) -> np.ndarray:
        texts = cells.get(heading)
        if texts is None:
            return np.full(len(lines), missing, dtype=kind)
        if missing is not None:
            texts = [text or missing for text in texts]
        try:
            return np.array(texts, dtype=object).astype(kind) if texts else np.empty(0, dtype=kind)
        except (ValueError, OverflowError):
            wrong = next(index for index, text in enumerate(texts) if not _is_number(text, kind))
            what = "a whole number" if kind is np.int64 else "a number"
            raise UsageError(f"line {lines[wrong]}: {texts[wrong][:40]!r} in the column {heading!r} is not {what}") from None

    whole = all(cells[value]) and all(_is_number(text, np.int64) for text in cells[value])
    values = numbers(value, np.int64 if whole else np.float64, None if whole else "nan")
    known = COLUMN_BY_NAME.get(name)
    if known is not None and known.dtype == "f4":
        values = values.astype(np.float64)
    stack = np.array(cells.get("stack", [""] * len(lines)), dtype=object)
    return _Table(
        values, numbers("layer", np.int64, None), numbers("channel", np.int64, None), numbers("expert", np.int64, "-1"), stack
    )


def _is_number(text: str, kind: Any) -> bool:
    try:
        np.array([text], dtype=object).astype(kind)
    except (ValueError, OverflowError):
        return False
    return True


def _value_heading(headings: Sequence[str], name: str) -> str:
    """The heading of the column's values. Raises `UsageError` if none is, or if the table does not name channels."""
    missing = [heading for heading in ("layer", "channel") if heading not in headings]
    if missing:
        raise UsageError(f"the table has no column {missing[0]!r}", hint="begin it with a line of headings: layer,channel,value")
    others = [heading for heading in headings if heading not in _KEYS]
    for wanted in (name, name.partition("/")[2]):
        if headings.count(wanted) == 1:
            return wanted
    if len(others) == 1:
        return others[0]
    raise UsageError(
        f"the table has no column {name} of values: {', '.join(map(repr, others[:8])) or 'only keys'}",
        hint=f"name the column {name}",
    )


def _from_table(table: _Table, name: str, stacks: Sequence[StackData], path: Path) -> dict[str, np.ndarray]:
    """The rows of ``table`` at their places in the stacks."""
    if not len(table.values):
        raise UsageError(f"{path} has no row")
    found: dict[str, np.ndarray] = {}
    named: dict[str, np.ndarray] = {}
    missing = np.nan if table.values.dtype.kind == "f" else 0
    # One group for each FFN that the rows name, so that a million rows are not a million look-ups.
    keys: dict[tuple[str, int, bool], list[int]] = {}
    for index, key in enumerate(zip(table.stack.tolist(), table.layer.tolist(), (table.expert >= 0).tolist(), strict=True)):
        keys.setdefault(key, []).append(index)
    for (stack_name, layer, has_expert), indices in keys.items():
        stack, row = _place(stacks, stack_name, layer, has_expert=has_expert)
        rows = np.array(indices)
        channel, expert = table.channel[rows], table.expert[rows]
        for what, ids, most in (("channel", channel, stack.n_channels), ("expert", expert, stack.n_experts if has_expert else 1)):
            wrong = (ids >= most) | (ids < (0 if what == "channel" or has_expert else -1))
            if wrong.any():
                raise UsageError(f"layer {layer} has no {what} {ids[wrong][0]}: it has {most}, counted from 0")
        at = (row, expert, channel) if has_expert else (row, channel)
        if stack.name not in found:
            found[stack.name] = np.full(shape_of(stack), missing, dtype=table.values.dtype)
            named[stack.name] = np.zeros(shape_of(stack), dtype=bool)
        flat = np.ravel_multi_index(np.broadcast_arrays(*map(np.asarray, at)), shape_of(stack))
        twice = named[stack.name].ravel()[flat].any() or len(np.unique(flat)) < len(flat)
        if twice:
            raise UsageError(f"layer {layer} has a channel that two rows name", hint="name every channel once")
        named[stack.name].ravel()[flat] = True
        found[stack.name].ravel()[flat] = table.values[rows]
    for stack_name, mask in named.items():
        if table.values.dtype.kind != "f" and not mask.all():
            raise UsageError(
                f"{name} holds whole numbers, and {int((~mask).sum())} channels of {stack_name} have no row",
                hint="name every channel, or write the numbers as 1.0",
            )
    return found


def _place(stacks: Sequence[StackData], name: str, layer: int, *, has_expert: bool) -> tuple[StackData, int]:
    """The stack and the row of the FFN of ``layer``. Raises `UsageError` if there is none, or more than one."""
    if name and name not in {stack.name for stack in stacks}:
        raise UsageError(f"there is no stack {name[:40]!r}", hint=f"stacks: {', '.join(stack.name for stack in stacks)}")
    found = [
        (stack, int(row))
        for stack in stacks
        if name in ("", stack.name) and bool(stack.n_experts) == has_expert
        for row in np.flatnonzero(np.asarray(stack.layers) == layer)
    ]
    if not found:
        raise UsageError(
            f"there is no FFN with{'' if has_expert else 'out'} experts in layer {layer}{f' of {name}' if name else ''}"
        )
    if len(found) > 1:
        raise UsageError(f"layer {layer} has several FFNs", hint="add a column 'stack', or pass an array of the whole stack")
    return found[0]
