"""Which channels a plan may never remove: ``--protect`` selectors and protect files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt import schema
from chanfmt.errors import AtlasError, UsageError
from chanfmt.models.checkpoint import no_duplicates

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chanfmt.atlas import Atlas
    from chanfmt.records import Block

PROTECT_FORMAT = "protect/1"
SELECTORS = "supernodes, none, or a protect FILE ending in .json"
_MAX_FILE = 64 << 20


@dataclass(frozen=True)
class ProtectList:
    """Protected channels of every FFN.

    Attributes:
        channels: Block index to ascending channel ids, int32; blocks that protect none are absent.
        warnings: What the user should know about where they came from.
    """

    channels: Mapping[int, np.ndarray]
    warnings: tuple[str, ...] = ()

    def of(self, block: Block) -> np.ndarray:
        """Ascending protected channel ids of ``block``, int32."""
        return self.channels.get(block.index, np.empty(0, dtype=np.int32))

    @property
    def count(self) -> int:
        """Protected channels in all FFNs."""
        return sum(len(ids) for ids in self.channels.values())


def protect_list(selectors: Sequence[str], atlas: Atlas) -> ProtectList:
    """The union of ``selectors``.

    Raises:
        UsageError: A selector or a protect file cannot mean anything for this atlas.
    """
    merged: dict[int, np.ndarray] = {}
    warnings: list[str] = []
    for selector in selectors:
        if selector == "none":
            continue
        selected = supernodes(atlas) if selector == "supernodes" else _from_file(selector, atlas)
        warnings += selected.warnings
        for index, ids in selected.channels.items():
            merged[index] = np.union1d(merged[index], ids).astype(np.int32) if index in merged else ids
    return ProtectList(merged, tuple(warnings))


def supernodes(atlas: Atlas) -> ProtectList:
    """Every channel that ``atlas`` labels a supernode (dense FFNs)."""
    return ProtectList({
        block.index: np.flatnonzero(stack.row("label", block.row) == schema.LABEL_SUPERNODE).astype(np.int32)
        for block, stack in atlas.rows() if not block.n_experts
    })


def read_protect_file(path: Path, atlas: Atlas) -> ProtectList:
    """Read ``{"format": "protect/1", "atlas_sha256": ..., "layers": {"1": [313, 1392]}}``.

    A file made for another atlas is read with a warning: channel ids outlive a new calibration.

    Raises:
        UsageError: Not such a file, or a layer, a channel id or a repetition that cannot be.
    """
    value = _read_json(path)
    layers = value.get("layers") if isinstance(value, dict) and value.get("format") == PROTECT_FORMAT else None
    if not isinstance(layers, dict):
        raise UsageError(f'{path} is not a protect file: it has no "format": "{PROTECT_FORMAT}" and "layers"')
    channels: dict[int, np.ndarray] = {}
    for key, ids in layers.items():
        block = _block(path, key, atlas)
        found = _ids(path, key, ids, block)
        if len(found):
            channels[block.index] = found
    warnings: tuple[str, ...] = ()
    if value.get("atlas_sha256") != atlas.content_sha256:
        warnings = (f"{path.name} was written for another atlas; its channel ids are used as they are",)
    return ProtectList(channels, warnings)


def _from_file(selector: str, atlas: Atlas) -> ProtectList:
    path = Path(selector)
    if path.suffix != ".json":
        raise UsageError(f"there is no --protect {selector!r}", hint=f"allowed: {SELECTORS}")
    return read_protect_file(path, atlas)


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_FILE:
            raise UsageError(f"the protect file {path} is larger than {_MAX_FILE >> 20} MB")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)
    except OSError as error:
        raise UsageError(f"cannot read the protect file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the protect file {path} is not valid JSON: {error}") from None


def _block(path: Path, key: str, atlas: Atlas) -> Block:
    # One spelling per layer: "01" beside "1" would name one layer twice.
    if not key.isascii() or not key.isdecimal() or len(key) > 9 or str(int(key)) != key:
        raise UsageError(f"{path}: {key!r} is not a layer index")
    try:
        block = atlas.block(int(key))
    except AtlasError as error:
        raise UsageError(f"{path}: {error.message}") from None
    if block.n_experts:
        raise UsageError(f"{path}: layer {key} has experts, and a protect file names channels of dense FFNs")
    return block


def _ids(path: Path, key: str, ids: Any, block: Block) -> np.ndarray:
    if not isinstance(ids, list) or not all(type(item) is int for item in ids):
        raise UsageError(f"{path}: layer {key} is not a list of channel ids")
    wrong = [item for item in ids if not 0 <= item < block.n_channels]
    if wrong:
        raise UsageError(f"{path}: layer {key} has no channel {wrong[0]}: it has {block.n_channels}, from 0")
    found = np.array(sorted(ids), dtype=np.int32)
    repeated = found[1:][found[1:] == found[:-1]]
    if len(repeated):
        raise UsageError(f"{path}: layer {key} lists channel {repeated[0]} twice")
    return found
