"""An atlas as a table (parquet, csv, arrow), as arrays (npz, json, safetensors), or as llama.cpp's importance matrix (gguf).

A table has one row per channel. Variables that are not per channel, such as sums per split, are among the arrays only. Columns
of other programs are written under their names, ``x_owner/name``. Every number is written so that reading it gives the same
bits.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import zipfile
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra.imatrix import write_imatrix
from chanfmt.base.claims import claimed
from chanfmt.base.errors import AtlasError, MissingPackageError, UsageError
from chanfmt.base.files import atomic_file, check_target
from chanfmt.base.narrate import say
from chanfmt.base.text import one_line, spreadsheet_text
from chanfmt.format import columns, schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from chanfmt.format.reader import Atlas, Stack

    _Column = np.ndarray | str | int | None

FORMATS = ("parquet", "csv", "arrow", "npz", "json", "safetensors")
IMATRIX = "gguf"
"""The format that is an importance matrix."""
TABLES = ("parquet", "csv", "arrow")
_SAFETENSORS = {("f", 4): "F32", ("f", 8): "F64", ("i", 4): "I32", ("i", 8): "I64", ("u", 1): "U8"}
"""Kind and bytes of a number to its name in a safetensors file."""
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


def export_format(path: Path) -> str:
    """The format that the extension of ``path`` names, one of `FORMATS` or `IMATRIX`. Raises `UsageError` for other extensions."""
    name = path.suffix.lower().removeprefix(".")
    known = (*FORMATS, IMATRIX)
    if name not in known:
        raise UsageError(f"cannot tell the format from {path.name!r}", hint=f"end -o in .{', .'.join(known)}")
    return name


def export(atlas: Atlas, path: Path, *, metrics: Sequence[str] | None = None, overwrite: bool = False) -> int:
    """Write ``atlas`` to ``path``, whole or not at all, in the format that its extension names.

    Args:
        metrics: Variables to write besides the labels, and columns of other programs by ``x_owner/name``; None for all that
            the format can hold.

    Returns:
        Number of rows of a table, of arrays in npz, json and safetensors, or of entries in gguf.

    Raises:
        UsageError: Unknown extension or metric, or ``path`` exists and ``overwrite`` is False.
        AtlasError: The name of a stack does not fit into a table or an archive.
        MissingPackageError: The format is parquet or arrow, and pyarrow is not installed.
        ChanfmtError: The disk is full, or ``path`` cannot be written.
    """
    kind = export_format(path)
    write: Callable[[Path], int]
    if kind == IMATRIX:
        if metrics is not None:
            raise UsageError("--metrics has no effect on an importance matrix", hint="leave it out")
        write = partial(write_imatrix, atlas)
    else:
        writers: dict[str, Callable[[Atlas, Sequence[schema.Variable], Path], int]] = {
            "parquet": partial(_write_arrow, file=False),
            "arrow": partial(_write_arrow, file=True),
            "csv": _write_csv,
            "npz": _write_npz,
            "json": _write_json,
            "safetensors": _write_safetensors,
        }
        write = partial(writers[kind], atlas, _choose(atlas, metrics, table=kind in TABLES))
    for name in atlas.stacks:
        # A spreadsheet runs a cell that starts with = + - @, and a member of an archive could be called ../x.
        if not _NAME.fullmatch(name):
            raise AtlasError(f"{atlas.path}: the stack name {name!r} is not made of letters, digits, '.', '_' and '-'")
    check_target(path, overwrite=overwrite)
    if path.exists() and path.samefile(atlas.file):
        raise UsageError(f"{path} is the atlas that is exported", hint="choose another -o")
    with claimed(path), atomic_file(path, overwrite=overwrite) as temporary:
        return write(temporary)


def describe(atlas: Atlas) -> dict[str, Any]:
    """Model, calibration, labels and FFNs of ``atlas`` as JSON-ready data, without arrays."""
    calibration = atlas.calibration
    return {
        **atlas.identity(),
        "calibration": {
            **{
                name: getattr(calibration, name)
                for name in ("loss", "metric_definition", "tokenizer", "sequences", "seq_len", "tokens", "seed")
            },
            **{
                name: None if tokens is None else dataclasses.asdict(tokens)
                for name, tokens in (
                    ("special_tokens", calibration.special_tokens),
                    ("tokenizer_special_tokens", calibration.tokenizer_special_tokens),
                )
            },
            "mean_loss": calibration.mean_loss if math.isfinite(calibration.mean_loss) else None,
            "contributions": [dataclasses.asdict(row) for row in calibration.contributions],
        },
        "labels": {**dataclasses.asdict(atlas.labels), "names": schema.LABELS},
        "ffns": [
            {
                "block": block.index,
                "layer": block.layer_index,
                "place": block.place,
                "module": block.module,
                "stack": block.stack,
                "row": block.row,
                "channels": block.n_channels,
                "experts": block.n_experts,
            }
            for block in atlas.blocks
        ],
    }


def _choose(atlas: Atlas, metrics: Sequence[str] | None, *, table: bool) -> list[schema.Variable]:
    """Variables to write besides ``label``, in the schema's order, then those of other programs.

    Raises `UsageError` if one cannot be written.
    """
    added = {item.name: item for stack in atlas.stacks.values() for item in stack.extension_metrics}
    odd = [name for name in added if not columns.NAME.fullmatch(name)]
    if odd:
        say(f"note: left out, because a table or an archive cannot hold such a name: {', '.join(map(one_line, odd))}")
    held = [
        *(
            variable
            for variable in schema.STACK_VARIABLES
            if variable.name != "label" and any(variable.name in stack for stack in atlas.stacks.values())
        ),
        *(item for name, item in added.items() if name not in odd),
    ]
    possible = [variable for variable in held if variable.per_channel] if table else held
    if metrics is None:
        return possible
    for name in metrics:
        if name not in {variable.name for variable in possible}:
            why = (
                "has no table column: it is not per channel"
                if name in {variable.name for variable in held}
                else "is not in this atlas"
            )
            raise UsageError(
                f"--metrics: {name!r} {why}", hint=f"choose from: {', '.join(variable.name for variable in possible)}"
            )
    return [variable for variable in possible if variable.name in metrics]


def _headings(atlas: Atlas, variables: Sequence[schema.Variable]) -> list[str]:
    experts = ["expert"] if any(stack.n_experts for stack in atlas.stacks.values()) else []
    return ["stack", "block", "layer", *experts, "channel", "label", *(variable.name for variable in variables)]


def _tables(atlas: Atlas, headings: Sequence[str]) -> Iterator[tuple[int, list[_Column]]]:
    """Make the rows of one FFN after the other, in model order, so that the whole table is never in memory.

    Yields:
        The number of rows, and per column its values (row,), or the one value of all rows; None is a missing value.
    """
    for block, stack in atlas.rows():
        experts = max(stack.n_experts, 1)
        known: dict[str, _Column] = {
            "stack": stack.name,
            "block": block.index,
            "layer": block.layer_index,
            "expert": np.repeat(stack["expert"], stack.n_channels) if stack.n_experts else None,
            "channel": np.tile(stack["channel"], experts),
        }
        for name in headings:
            if name not in known:
                known[name] = stack.row(name, block.row).ravel() if name in stack else None
        yield experts * stack.n_channels, [known[name] for name in headings]


def _write_csv(atlas: Atlas, variables: Sequence[schema.Variable], path: Path) -> int:
    headings = _headings(atlas, variables)
    labels = {code: name.encode() for code, name in schema.LABELS.items()}
    total = 0
    with open(path, "wb") as stream:
        stream.write(",".join(headings).encode() + b"\n")
        for count, table in _tables(atlas, headings):
            cells: list[list[bytes]] = []
            for name, values in zip(headings, table, strict=True):
                if isinstance(values, str):
                    cells.append([spreadsheet_text(values).encode()] * count)
                elif not isinstance(values, np.ndarray):
                    cells.append([b"" if values is None else str(values).encode()] * count)
                elif name == "label":
                    cells.append([labels.get(code, b"") for code in values.tolist()])
                else:
                    cells.append(_texts(values, missing=b""))
            stream.write(b"\n".join(map(b",".join, zip(*cells, strict=True))) + b"\n")
            total += count
    return total


def _write_arrow(atlas: Atlas, variables: Sequence[schema.Variable], path: Path, *, file: bool) -> int:
    """Write the table as an Arrow IPC ``file`` (Feather version 2), or as parquet."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise MissingPackageError("pyarrow", "", f"writing {'arrow' if file else 'parquet'}") from None
    headings = _headings(atlas, variables)
    text = arrow.dictionary(arrow.int32(), arrow.string())
    numbers = {"f4": arrow.float32(), "f8": arrow.float64(), "i4": arrow.int32(), "i8": arrow.int64(), "u1": arrow.uint8()}
    types = {"stack": text, "label": text} | {variable.name: numbers[variable.dtype] for variable in variables}
    description = describe(atlas)
    layout = arrow.schema(
        [(name, types.get(name, arrow.int32())) for name in headings],
        metadata=_metadata(atlas, description),
    )
    # A file of batches has one dictionary for each column.
    names = list(atlas.stacks)

    def encode(name: str, values: _Column, count: int) -> Any:
        if name == "label" and isinstance(values, np.ndarray):
            codes = arrow.array(values.astype(np.int32), mask=~np.isin(values, list(schema.LABELS)))
            return arrow.DictionaryArray.from_arrays(codes, list(schema.LABELS.values()))
        if isinstance(values, str):
            return arrow.DictionaryArray.from_arrays(arrow.array(np.full(count, names.index(values), dtype=np.int32)), names)
        if values is None:
            return arrow.nulls(count, layout.field(name).type)
        return arrow.array(np.broadcast_to(values, count), layout.field(name).type, from_pandas=False)

    total = 0
    with arrow.ipc.new_file(path, layout) if file else parquet.ParquetWriter(path, layout) as writer:
        for count, table in _tables(atlas, headings):
            arrays = [encode(name, values, count) for name, values in zip(headings, table, strict=True)]
            # One batch or row group per FFN, so that a reader can read one layer without the other layers.
            if file:
                writer.write_batch(arrow.RecordBatch.from_arrays(arrays, schema=layout))
            else:
                writer.write_table(arrow.Table.from_arrays(arrays, schema=layout), row_group_size=count)
            total += count
    return total


def _metadata(atlas: Atlas, description: dict[str, Any]) -> dict[str, str]:
    """What a file with texts of its own says about the atlas."""
    return {
        "format_version": atlas.format_version,
        "content_sha256": atlas.content_sha256,
        "model_id": atlas.model.id,
        "model_revision": atlas.model.revision,
        "labels": json.dumps(description["labels"]),
        "atlas": json.dumps(description),
    }


def _write_npz(atlas: Atlas, variables: Sequence[schema.Variable], path: Path) -> int:
    total = 0
    with zipfile.ZipFile(path, "w") as archive:
        _add_member(archive, "atlas", np.array(json.dumps(describe(atlas))))
        for stack in atlas.stacks.values():
            for name in (*_indices(stack), *_held(stack, variables)):
                _add_member(archive, f"{stack.name}/{name}", stack[name])
                total += 1
    return total


def _write_safetensors(atlas: Atlas, variables: Sequence[schema.Variable], path: Path) -> int:
    # By hand, one array in memory at a time, so that equal atlases give equal files: the order in which the library writes
    # the metadata is random.
    held = [(stack, name) for stack in atlas.stacks.values() for name in (*_indices(stack), *_held(stack, variables))]
    # The widest numbers come first, so that every array is aligned.
    held.sort(key=lambda item: -item[0].location(item[1]).dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": _metadata(atlas, describe(atlas))}
    end = 0
    for stack, name in held:
        place = stack.location(name)
        begin, end = end, end + math.prod(place.shape) * place.dtype.itemsize
        code = _SAFETENSORS[place.dtype.kind, place.dtype.itemsize]
        header[f"{stack.name}/{name}"] = {"dtype": code, "shape": list(place.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for stack, name in held:
            values = stack[name]
            stream.write(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).data)
    return len(held)


def _add_member(archive: zipfile.ZipFile, name: str, values: np.ndarray) -> None:
    # The stated time is fixed, so that equal atlases give equal archives.
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        np.lib.format.write_array(member, values, allow_pickle=False)


def _write_json(atlas: Atlas, variables: Sequence[schema.Variable], path: Path) -> int:
    total = 0
    with open(path, "wb") as stream:
        stream.write(json.dumps(describe(atlas), allow_nan=False).encode()[:-1] + b', "stacks": {')
        for position, stack in enumerate(atlas.stacks.values()):
            names = _held(stack, variables)
            dimensions = [item for item in (schema.STACK_VARIABLE_BY_NAME["label"], *variables) if item.name in names]
            head = {
                "kind": stack.kind,
                "gated": stack.gated,
                "activation": stack.activation,
                **{name: stack[name].tolist() for name in _indices(stack)},
                "dimensions": {item.name: schema.stack_dimensions(item, stack.kind) for item in dimensions},
            }
            stream.write(b"," * bool(position) + f"\n{json.dumps(stack.name)}: {json.dumps(head)[:-1]}, ".encode())
            stream.write(b'"variables": {')
            for index, name in enumerate(names):
                stream.write(b"," * bool(index) + f'\n"{name}": '.encode())
                stream.writelines(_nested(stack[name]))
                total += 1
            stream.write(b"}}")
        stream.write(b"}}\n")
    return total


def _nested(values: np.ndarray) -> Iterator[bytes]:
    """``values`` as nested JSON lists with one line per row of the last dimension; NaN becomes null."""
    if values.ndim == 1:
        yield b"[" + b",".join(_texts(values, missing=b"null")) + b"]"
        return
    for index, inner in enumerate(values):
        yield b",\n" if index else b"["
        yield from _nested(inner)
    yield b"]"


def _indices(stack: Stack) -> list[str]:
    return [variable.name for variable in schema.INDEX_VARIABLES if variable.name in stack]


def _held(stack: Stack, variables: Sequence[schema.Variable]) -> list[str]:
    return [name for name in ("label", *(variable.name for variable in variables)) if name in stack]


def _texts(values: np.ndarray, *, missing: bytes) -> list[bytes]:
    """The shortest decimal text of each of ``values`` (1-D) that reads back as the same number; NaN becomes ``missing``."""
    texts = values.astype("S")
    if values.dtype.kind == "f":
        texts[np.isnan(values)] = missing
    return texts.tolist()
