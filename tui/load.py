"""An atlas as arrays in memory: read once, the file closed again, never changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import chanfmt
from chanfmt import schema
from chanfmt.console import printable
from chanfmt.errors import AtlasError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chanfmt.atlas import Atlas

Signature = tuple[int, int, int]


@dataclass(frozen=True)
class Ffn:
    """One FFN of the model, a row of the overview."""

    layer_index: int
    stack: str
    module: str
    row: int
    n_channels: int

    def name(self, *, with_stack: bool) -> str:
        return f"layer {self.layer_index} {self.stack}" if with_stack else f"layer {self.layer_index}"


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What an atlas held when it was read.

    Attributes:
        path: The file.
        signature: `file_signature` from before it was read.
        read_at: When it was read.
        metrics: Metrics at least one stack holds, in the schema's order.
        ffns: Every FFN in model order.
        arrays: Stack and metric to float32 (layer, channel).
        labels: Stack to uint8 (layer, channel).
    """

    path: Path
    signature: Signature
    read_at: datetime
    model_id: str
    status: str
    tokens: int
    rho: float
    metrics: tuple[str, ...]
    ffns: tuple[Ffn, ...]
    arrays: Mapping[tuple[str, str], np.ndarray]
    labels: Mapping[str, np.ndarray]

    @property
    def several_stacks(self) -> bool:
        return len(self.labels) > 1

    def values(self, ffn: int, metric: str) -> np.ndarray:
        """``metric`` of FFN ``ffn``, (channel,); NaN where its stack has no such metric."""
        row = self.ffns[ffn]
        array = self.arrays.get((row.stack, metric))
        return np.full(row.n_channels, np.nan, dtype=np.float32) if array is None else array[row.row]

    def labels_of(self, ffn: int) -> np.ndarray:
        """Labels of FFN ``ffn``, uint8 (channel,)."""
        row = self.ffns[ffn]
        return self.labels[row.stack][row.row]


def file_signature(path: Path) -> Signature:
    """What changes when the file is replaced or written. Raises `OSError`."""
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size, status.st_ino


def read_snapshot(path: str | Path, *, contained: bool = False) -> Snapshot:
    """Read ``path`` whole and close it; ``contained`` as in `chanfmt.open`.

    Raises:
        AtlasError: Not a readable atlas, or nothing in it that can be shown.
    """
    path = Path(path)
    try:
        signature = file_signature(path)
    except OSError:
        signature = (0, 0, 0)  # chanfmt.open says what is wrong.
    with chanfmt.open(path, contained=contained) as atlas:
        try:
            return _read(atlas, path, signature)
        except (OSError, RuntimeError) as error:
            raise AtlasError(f"{path} could not be read: {error}", hint="copy it again, or rebuild it") from None


def _read(atlas: Atlas, path: Path, signature: Signature) -> Snapshot:
    for stack in atlas.stacks.values():
        if stack.kind == "experts":
            raise AtlasError(
                f"{path}: the stack {stack.name!r} holds experts, which atlas-tui does not show yet",
                hint=f"see: atlas info {path}",
            )
    if not atlas.blocks:
        raise AtlasError(f"{path} holds no FFN", hint=f"see: atlas info {path}")
    arrays = {
        (printable(name), metric): stack[metric]
        for name, stack in atlas.stacks.items()
        for metric in dict.fromkeys(("lp", *stack.metrics))
    }
    if all(np.isnan(array).all() for (_, metric), array in arrays.items() if metric == "lp"):
        raise AtlasError(f"{path} holds no measured LP: every value is NaN", hint="build it again")
    return Snapshot(
        path=path,
        signature=signature,
        read_at=datetime.now(),
        model_id=printable(atlas.model.id),
        status=printable(atlas.status),
        tokens=atlas.calibration.tokens,
        rho=atlas.labels.rho,
        metrics=tuple(item.name for item in schema.METRICS if any(item.name == metric for _, metric in arrays)),
        ffns=tuple(
            Ffn(block.layer_index, printable(block.stack), printable(block.module), block.row, block.n_channels)
            for block in atlas.blocks
        ),
        arrays=arrays,
        labels={printable(name): stack["label"] for name, stack in atlas.stacks.items()},
    )
