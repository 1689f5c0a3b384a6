"""Protect files (spec/protect-1.md): channels that people chose, as JSON, csv or plain lines."""

from __future__ import annotations

import csv
import json
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from chanfmt.base.errors import UsageError
from chanfmt.base.files import atomic_file
from chanfmt.base.parsed import check_type, parse_unique
from chanfmt.format.unit import unit_rows
from surgery.planning.addresses import check_channel, find_ffn, find_unit, parse_number, unit_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from chanfmt.format.reader import Atlas
    from chanfmt.format.records import Block

PROTECT_FORMAT = "protect/1"
SUFFIXES = (".json", ".csv", ".txt")
_MAX_FILE = 64 << 20
_COLUMNS = ("layer", "channel", "stack", "expert")


class _StoredList(msgspec.Struct):
    """A JSON protect file. A list of ids is checked where its layer can be named."""

    format: str
    layers: dict[str, Any]
    atlas_sha256: Any = None


def no_channels(atlas: Atlas) -> dict[int, np.ndarray]:
    """Block index to a mask of the FFN's channels, bool of `Block.shape`, all False."""
    return {block.index: np.zeros(block.shape, dtype=bool) for block in atlas.blocks}


def read_protect_file(path: Path, atlas: Atlas) -> tuple[dict[int, np.ndarray], tuple[str, ...]]:
    """Read a protect file. Its suffix says which kind it is. Nothing in the file is trusted.

    A file that was made for another atlas is read with a warning, because channel ids outlive a new calibration.

    Returns:
        Block index to a mask of the named channels, bool of `Block.shape`, for every FFN; and warnings.

    Raises:
        UsageError: The file cannot be read, names a layer or channel that does not exist, or names a channel twice.
    """
    text = _read_text(path)
    if path.suffix == ".json":
        return _from_json(path, text, atlas)
    lines: Iterable[str] = text.splitlines()
    if path.suffix == ".txt":
        lines = (line.split("#", 1)[0] for line in lines)
    return _from_rows(path, csv.reader(lines, strict=True), atlas), ()


def write_protect_file(path: Path, atlas: Atlas, channels: Mapping[int, np.ndarray]) -> None:
    """Write a JSON protect file, whole or not at all. A file that is there is replaced.

    Args:
        channels: Block index to a mask of the listed channels, bool of `Block.shape`. A missing FFN has no listed channels.

    Raises:
        UsageError: No key tells one of the FFNs from the others.
        ChanfmtError: The file cannot be written.
    """
    layers = {}
    for block in atlas.blocks:
        rows = unit_rows(channels.get(block.index, np.zeros(block.shape, dtype=bool)))
        for expert, row in zip(block.experts, rows, strict=True):
            if row.any():
                layers[unit_key(atlas, block, expert)] = np.flatnonzero(row).tolist()
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_text(_as_json(atlas.content_sha256, layers), encoding="utf-8")


def mark(masks: Mapping[int, np.ndarray], block: Block, expert: int | None, channels: Iterable[int]) -> None:
    """Set ``channels`` of one FFN, or of one of its experts, in ``masks``.

    Raises:
        UsageError: A channel does not exist, or is set already.
    """
    row = masks[block.index] if expert is None else masks[block.index][expert]
    for channel in channels:
        check_channel(channel, block.n_channels)
        if row[channel]:
            raise UsageError(f"it names channel {channel} twice")
        row[channel] = True


def _read_text(path: Path) -> str:
    try:
        status = path.stat()
        # Reading a pipe or a device might never end.
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"the protect file {path} is not a file")
        if status.st_size > _MAX_FILE:
            raise UsageError(f"the protect file {path} is larger than {_MAX_FILE >> 20} MB")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read the protect file {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"the protect file {path} is not text: {error}") from None


def _as_json(atlas_sha256: str, layers: Mapping[str, list[int]]) -> str:
    """A protect file with one line per layer, so that ``git diff`` shows which layers changed."""
    outer = json.dumps({"format": PROTECT_FORMAT, "atlas_sha256": atlas_sha256, "layers": {}}, indent=1)
    if not layers:
        return outer + "\n"
    lines = ",\n".join(f"  {json.dumps(key, ensure_ascii=False)}: {json.dumps(ids)}" for key, ids in layers.items())
    return outer.removesuffix("{}\n}") + f"{{\n{lines}\n }}\n}}\n"


def _from_json(path: Path, text: str, atlas: Atlas) -> tuple[dict[int, np.ndarray], tuple[str, ...]]:
    try:
        stored = check_type(parse_unique(text), _StoredList)
        if stored.format != PROTECT_FORMAT:
            raise ValueError(f"its format is not {PROTECT_FORMAT}")
    except ValueError as error:
        raise UsageError(
            f"{path} is not a protect file: {error}", hint=f'a protect file has "format": "{PROTECT_FORMAT}" and "layers"'
        ) from None
    masks = no_channels(atlas)
    for key, ids in stored.layers.items():
        with _naming(f"{path}: layer {key[:40]!r}"):
            try:
                channels = check_type(ids, list[int])
            except ValueError as error:
                raise UsageError(f"its value is not a list of channel ids: {error}") from None
            mark(masks, *find_unit(key, atlas), channels)
    if stored.atlas_sha256 == atlas.content_sha256:
        return masks, ()
    return masks, (f"{path.name} was written for another atlas; its channel ids are used as they are",)


def _from_rows(path: Path, rows: Any, atlas: Atlas) -> dict[int, np.ndarray]:
    masks = no_channels(atlas)
    columns: list[str] | None = None
    try:
        for row in rows:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            with _naming(f"{path}, line {rows.line_num}"):
                _check_separator(cells)
                if columns is None:
                    header = _header(cells)
                    columns = header or ["layer", "channel"]
                    if header:
                        continue
                _mark_row(masks, columns, cells, atlas)
    except csv.Error as error:
        raise UsageError(f"{path}, line {rows.line_num}: {error}") from None
    return masks


def _check_separator(cells: list[str]) -> None:
    """Raise `UsageError` for a line without commas that has another separator: some spreadsheets write such files as CSV."""
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(cells) == 1 and separator in cells[0]:
            raise UsageError(f"its columns are separated by {name}, not commas", hint="save the table again, with commas")


def _header(cells: list[str]) -> list[str] | None:
    """Column names if the first line is a header, else None. Other columns, such as those of `atlas export`, are skipped."""
    if cells[0][:1].isdecimal():
        return None
    for name in _COLUMNS:
        if cells.count(name) > 1 or (name in ("layer", "channel") and name not in cells):
            raise UsageError(f"the first line is neither a header with one column {name!r} nor LAYER,CHANNEL")
    return cells


def _mark_row(masks: Mapping[int, np.ndarray], columns: list[str], cells: list[str], atlas: Atlas) -> None:
    if len(cells) != len(columns):
        raise UsageError(f"it has {len(cells)} columns, not {len(columns)}: {','.join(columns)[:100]}")
    row = dict(zip(columns, cells, strict=True))
    expert = row.get("expert") or None
    block, number = find_ffn(
        atlas,
        row.get("stack") or None,
        parse_number(row["layer"], "a layer index"),
        None if expert is None else parse_number(expert, "an expert index"),
    )
    mark(masks, block, number, [parse_number(row["channel"], "a channel")])


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Add ``where`` to every `UsageError` of the body."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", hint=error.hint) from None
