"""Put numbers that were measured on a text into an atlas, as well-known columns that say what they were measured on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra.columns import About, shape_of, with_columns
from chanfmt.algebra.rewrite import check_finished, noted
from chanfmt.base.errors import UsageError
from chanfmt.base.files import output_path
from chanfmt.base.narrate import say
from chanfmt.base.text import one_line
from chanfmt.format.columns import COLUMN_BY_NAME
from chanfmt.format.reader import Atlas
from chanfmt.format.writer import write_atlas

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from pathlib import Path

    from chanfmt.format.records import AtlasContent
    from surgery.experiments.subject import Subject

    Columns = Mapping[str, Mapping[int, np.ndarray]]
    """Name of each column to block index to values, float of `Block.shape`; NaN where nothing was measured."""


def store_path(store: str | os.PathLike[str], atlas: Atlas) -> Path:
    """The path of the atlas to write. Raises `UsageError` if another file is there, or the directory does not exist."""
    path = output_path(store)
    if path.exists() and not (atlas.path.exists() and path.samefile(atlas.path)):
        raise UsageError(f"{path} exists, and is not the atlas that was given", hint="choose a new file, or the atlas itself")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"the directory {path.absolute().parent} does not exist", hint="create it, or choose another file")
    return path


def measured_on(identity: Mapping[str, Any], how: str = "") -> str:
    """What numbers were measured on, and ``how``, in one line. Numbers with the same line may be compared.

    Args:
        identity: As `Subject.identity`.
    """
    # The digest is that of all tokens, so that two texts of one name are told apart.
    return (
        f"measured on {one_line(str(identity['data']), 200)}, {identity['tokens']} tokens in blocks of {identity['seq_len']} "
        f"(SHA-256 {identity['tokens_sha256'][:12]}), {identity['dtype']}{', ' if how else ''}{how}"
    )


def check_store(
    atlas: Atlas, subject: Subject, names: tuple[str, ...], masks: Mapping[int, np.ndarray], about: str, *, replace: bool
) -> None:
    """Raise the errors of `store_columns` that show before anything is measured.

    Args:
        names: The columns, the main one first.
        masks: Block index to the channels that will be measured, bool of `Block.shape`.
        about: As `measured_on`.

    Raises:
        UsageError: The model was passed in memory; the atlas's file has changed; or the atlas has numbers that were measured
            differently, or a number of a channel in ``masks``.
    """
    _check_unchanged(atlas)
    if subject.source is None:
        raise UsageError(
            "numbers of a model in memory cannot be stored, because nothing shows that it is the atlas's model",
            hint="pass the directory or the name of the model",
        )
    if replace:
        return
    for metric in [metric for stack in atlas.stacks.values() for metric in stack.extension_metrics]:
        if metric.name in names and metric.long_name != _described(metric.name, about):
            raise UsageError(
                f"the atlas has {metric.name} already, and it was measured differently: {one_line(metric.long_name, 300)}",
                hint="add --replace to replace it, or begin with an atlas without it",
            )
    for block, stack in atlas.rows():
        mask = masks.get(block.index)
        if mask is None or names[0] not in stack:
            continue
        there = np.argwhere(np.isfinite(stack.row(names[0], block.row)) & mask)
        if len(there):
            raise UsageError(
                f"the atlas has {names[0]} of channel {there[0][-1]} of layer {block.layer_index} already",
                hint="add --replace to measure it again, or choose other channels",
            )


def with_measured(content: AtlasContent, measured: Columns, about: str) -> AtlasContent:
    """``content`` with the columns ``measured``, beside the values that were measured alike and that are not in ``measured``.

    A column that was measured differently is dropped: `check_store` asks first.

    Raises:
        AtlasError: The build is unfinished.
    """
    check_finished(content)
    stacks = {stack.name: stack for stack in content.stacks}
    blocks = {block.index: block for block in content.blocks}
    for name, found in measured.items():
        arrays = _held(content, name, _described(name, about))
        for index, values in found.items():
            block = blocks[index]
            if block.stack not in arrays:
                arrays[block.stack] = np.full(shape_of(stacks[block.stack]), np.nan, dtype=np.float64)
            known = np.isfinite(values)
            arrays[block.stack][block.row][known] = values[known]
        content = with_columns(content, {name: arrays}, About(description=_described(name, about)), replace=True)
    return content


def store_columns(atlas: Atlas, path: Path, measured: Columns, about: str, command: str, identity: Mapping[str, Any]) -> str:
    """Write ``atlas`` as ``path``, with the columns ``measured``; see `with_measured`. Returns the new ``content_sha256``.

    The file is written beside ``path`` and renamed, so that an atlas of that name is whole at every moment. The history says
    what was measured: text, number and SHA-256 of the tokens, length of a block, dtype.

    Raises:
        UsageError: The atlas's file has changed since it was opened, so that columns would be lost.
    """
    _check_unchanged(atlas)
    content = with_measured(atlas.content(), measured, about)
    about_text = {key: identity[key] for key in ("data", "tokens", "tokens_sha256", "seq_len", "dtype")}
    content = noted(
        content, command, [atlas.content_sha256], [atlas.hub_source], columns=dict.fromkeys(measured, about), **about_text
    )
    digest = write_atlas(content, path, overwrite=True)
    count = sum(int(np.isfinite(values).sum()) for values in next(iter(measured.values())).values())
    say(f"wrote {path}: {', '.join(measured)} of {count} channels; a merge leaves them out")
    return digest


def _check_unchanged(atlas: Atlas) -> None:
    """Raise `UsageError` if another atlas took the place of the file since ``atlas`` was opened."""
    if not atlas.path.exists():
        return
    with Atlas.open(atlas.path) as now:
        if now.content_sha256 != atlas.content_sha256:
            raise UsageError(f"{atlas.path} has changed since it was opened", hint="open it again, and measure again")


def _described(name: str, about: str) -> str:
    return f"{COLUMN_BY_NAME[name].long_name}; {about}"


def _held(content: AtlasContent, name: str, description: str) -> dict[str, np.ndarray]:
    """The arrays of the column ``name`` that have this description, by stack, float64."""
    owner, _, own = name.partition("/")
    groups = {group.path: group for group in content.extensions}
    return {
        stack.name: np.array(item.values, dtype=np.float64)
        for stack in content.stacks
        if (group := groups.get(f"{owner}/{stack.name}")) is not None
        for item in group.variables
        if item.name == own and item.long_name == description
    }
