"""Read and write the protect file, which ``surgery prune --protect`` also reads (spec/protect-1.md)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.errors import UsageError
from chanfmt.base.files import PARTIAL_SUFFIX, stem_beside
from chanfmt.format.unit import unit_rows
from surgery.planning.protect_file import read_protect_file, write_protect_file
from surgery.planning.selectors import select
from tui.session.load import Signature, file_signature, reopened

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chanfmt.format.reader import Atlas
    from tui.session.load import Snapshot

NO_FILE: Signature = (0, 0, 0)
"""The signature of a file that does not exist."""


def check_name(path: Path) -> None:
    """Raise `UsageError` if ``path`` does not end in .json, because the marks are written as JSON."""
    if path.suffix != ".json":
        raise UsageError(
            f"the protect file is JSON, and {path.name} does not end in .json",
            hint="name a .json file (surgery prune --protect also reads .csv and .txt)",
        )


def default_protect_file(atlas: Path) -> Path:
    """Where the marks of ``atlas`` go by default: ``NAME.protect.json`` beside the atlas."""
    finished = Path(str(atlas).removesuffix(PARTIAL_SUFFIX))
    return finished.with_name(f"{stem_beside(finished.stem)}.protect.json")


def signature_of(path: Path) -> Signature:
    """`file_signature` of ``path``; `NO_FILE` if ``path`` does not exist."""
    try:
        return file_signature(path)
    except OSError:
        return NO_FILE


def read_marks(path: Path, snapshot: Snapshot) -> tuple[dict[int, np.ndarray], tuple[str, ...], Signature]:
    """Read the protect file ``path``.

    Returns:
        Marks (FFN of ``snapshot`` to bool (channel,)), warnings, and the signature of ``path``. If ``path`` does not exist:
        no marks, no warnings, and `NO_FILE`.

    Raises:
        UsageError: ``path`` is not a protect file for this atlas.
        AtlasError: The FFNs of the atlas have changed.
    """
    signature = signature_of(path)
    if signature == NO_FILE:
        return {}, (), signature
    with reopened(snapshot) as opened:
        masks, warnings = read_protect_file(path, opened)
        return to_ffns(masks, opened), warnings, signature


def write_marks(path: Path, snapshot: Snapshot, masks: Mapping[int, np.ndarray]) -> Signature:
    """Write ``masks``, FFN to bool (channel,), whole or not at all; return the signature of the new file.

    Raises:
        ChanfmtError: ``path`` cannot be written, or the FFNs of the atlas have changed.
    """
    with reopened(snapshot) as opened:
        write_protect_file(path, opened, to_blocks(masks, opened))
    return signature_of(path)


def selected(selector: str, snapshot: Snapshot) -> dict[int, np.ndarray]:
    """FFN to the channel ids that ``selector`` names, as after ``surgery prune --protect``.

    Raises:
        UsageError: ``selector`` means nothing for this atlas.
        AtlasError: The atlas lacks a metric that ``selector`` needs, or its FFNs have changed.
    """
    with reopened(snapshot) as opened:
        masks, _ = select(selector, opened)
        return {ffn: np.flatnonzero(mask) for ffn, mask in to_ffns(masks, opened).items()}


def to_ffns(masks: Mapping[int, np.ndarray], atlas: Atlas) -> dict[int, np.ndarray]:
    """Masks by FFN of a snapshot, bool (channel,), from masks by block, bool of `Block.shape`."""
    rows: list[np.ndarray] = []
    for block in atlas.blocks:
        rows += list(unit_rows(masks.get(block.index, np.zeros(block.shape, dtype=bool))))
    return dict(enumerate(rows))


def to_blocks(masks: Mapping[int, np.ndarray], atlas: Atlas) -> dict[int, np.ndarray]:
    """Masks by block, bool of `Block.shape`, from masks by FFN of a snapshot, bool (channel,)."""
    blocks, start = {}, 0
    for block in atlas.blocks:
        stop = start + (len(block.experts))
        blocks[block.index] = np.stack([masks[ffn] for ffn in range(start, stop)]).reshape(block.shape)
        start = stop
    return blocks
