"""An atlas as the screens need it: structure, LP and labels in memory, other metrics where they lie in the file."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import chanfmt
from chanfmt.base.errors import AtlasError
from chanfmt.base.text import printable
from chanfmt.format import schema
from tui.session.stored import StoredArrays

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from chanfmt.format.reader import Atlas, Location
    from chanfmt.format.schema import Variable

Signature = tuple[int, int, int]
PARTIAL_SUFFIX = ".partial"
"""What ``atlas build`` adds to the name of its output while it is not finished."""
TRIES = 20


@dataclass(frozen=True)
class Ffn:
    """Channels that are ranked together: a dense FFN, or one expert of one with experts."""

    layer_index: int
    stack: str
    module: str
    row: int
    n_channels: int
    expert: int | None = None

    @property
    def identity(self) -> tuple[int, str, int | None]:
        """What it is called in any atlas of the model."""
        return self.layer_index, self.module, self.expert

    def name(self, *, with_stack: bool) -> str:
        stack = f" {self.stack}" if with_stack else ""
        return f"layer {self.layer_index}{stack}" + ("" if self.expert is None else f" expert {self.expert}")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What an atlas held when it was read.

    Attributes:
        path: The file.
        signature: `file_signature` of what was read.
        read_at: When it was read.
        metrics: Name to metric, those at least one stack holds: the schema's, in its order, then other programs'.
        ffns: Every dense FFN and every expert, in model order.
        blocks: The model's FFNs as ranges of ``ffns``: several experts, or one.
        lp: Stack to float32 (layer[, expert], channel).
        labels: Stack to uint8 (layer[, expert], channel).
        tokens: Stack to the tokens that reached each FFN, int64 (layer[, expert]); stacks that do not say are left out.
        calibration_tokens: Tokens of the calibration text.
        supports: Stack to the sizes of the write support that ``connectivity_at`` is about.
        places: Stack and metric, or one of `chanfmt.format.schema.SERIES`, to where its values lie.
    """

    path: Path
    signature: Signature
    read_at: datetime
    model_id: str
    status: str
    calibration_tokens: int
    rho: float
    metrics: Mapping[str, Variable]
    ffns: tuple[Ffn, ...]
    blocks: tuple[range, ...]
    lp: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray]
    supports: Mapping[str, tuple[int, ...]]
    places: Mapping[tuple[str, str], Location]
    stored: StoredArrays

    @property
    def several_stacks(self) -> bool:
        return len(self.labels) > 1

    @property
    def has_experts(self) -> bool:
        return any(len(block) > 1 for block in self.blocks)

    def nearest(self, ffn: Ffn) -> int:
        """The FFN called like ``ffn`` of another atlas of the model; where there is none, the last of no later layer."""
        place = self._places_of_ffns.get(ffn.identity)
        if place is None:
            place = max((place for place, own in enumerate(self.ffns) if own.layer_index <= ffn.layer_index), default=0)
        return place

    @cached_property
    def _places_of_ffns(self) -> dict[tuple[int, str, int | None], int]:
        return {ffn.identity: place for place, ffn in enumerate(self.ffns)}

    def block_of(self, ffn: int) -> int:
        """Which of ``blocks`` FFN ``ffn`` is in."""
        return next(number for number, block in enumerate(self.blocks) if ffn in block)

    def block_around(self, ffn: int) -> range:
        """Of ``blocks``, the one that FFN ``ffn`` is in."""
        return self.blocks[self.block_of(ffn)]

    def values(self, ffn: int, metric: str) -> np.ndarray:
        """``metric`` of FFN ``ffn``, floating point (channel,); NaN where its stack has no such metric."""
        place = self.ffns[ffn]
        return _one(self._row(place, metric), place)

    def span_values(self, span: range, metric: str) -> np.ndarray:
        """``metric`` of all of ``span``, one FFN or all of a block, (channels,)."""
        place = self.ffns[span[0]]
        return self.values(span[0], metric) if len(span) == 1 else self._row(place, metric).ravel()

    def labels_of(self, ffn: int) -> np.ndarray:
        """Labels of FFN ``ffn``, uint8 (channel,)."""
        place = self.ffns[ffn]
        return _one(self.labels[place.stack][place.row], place)

    def span_labels(self, span: range) -> np.ndarray:
        """Labels of all of ``span``, one FFN or all of a block, uint8 (channels,)."""
        place = self.ffns[span[0]]
        return self.labels_of(span[0]) if len(span) == 1 else self.labels[place.stack][place.row].ravel()

    def tokens_of(self, ffn: int) -> int | None:
        """Tokens that reached FFN ``ffn``, None where the file does not say."""
        place = self.ffns[ffn]
        tokens = self.tokens.get(place.stack)
        return None if tokens is None else int(tokens[place.row] if place.expert is None else tokens[place.row, place.expert])

    def series(self, ffn: int, name: str) -> np.ndarray | None:
        """One of `chanfmt.format.schema.SERIES` for FFN ``ffn``, (n,) or (n, channel); None where it is not held."""
        place = self.ffns[ffn]
        location = self.places.get((place.stack, name))
        if location is None:
            return None
        index = (place.row,) if place.expert is None else (place.row, place.expert)
        return np.stack([self.stored.at(location, step, *index) for step in range(location.shape[0])])

    def _row(self, place: Ffn, metric: str) -> np.ndarray:
        if metric == "lp":
            return self.lp[place.stack][place.row]
        location = self.places.get((place.stack, metric))
        if location is None:
            return np.full(self.lp[place.stack].shape[1:], np.nan, dtype=np.float32)
        return self.stored.at(location, place.row)


def _one(row: np.ndarray, place: Ffn) -> np.ndarray:
    return row if place.expert is None else row[place.expert]


def file_signature(path: Path) -> Signature:
    """What changes when the file is replaced or written. Raises `OSError`."""
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size, status.st_ino


def present_file(path: Path) -> Path:
    """``path``, or what a build that will write it has measured so far, or what such a build has since written."""
    # Unlike a path's own methods, these two say no where one cannot look; why shows when the file is opened.
    if os.path.exists(path):
        return path
    finished = path.with_name(path.name.removesuffix(PARTIAL_SUFFIX))
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    other = finished if path.name.endswith(PARTIAL_SUFFIX) else partial
    return other if os.path.isfile(other) else path


def read_snapshot(path: str | Path, *, contained: bool = False) -> Snapshot:
    """Read ``path``, or what `present_file` finds in its place; ``contained`` as in `chanfmt.open`.

    Raises:
        AtlasError: Not a readable atlas, or nothing in it that can be shown.
    """
    path = present_file(Path(path))
    for _ in range(TRIES):
        with chanfmt.open(path, contained=contained) as atlas:
            try:
                stored = StoredArrays(path)
                snapshot = _read(atlas, path, stored)
                # Otherwise a writer put another file there since it was opened.
                if file_signature(path) == stored.signature:
                    return snapshot
            except (OSError, RuntimeError) as error:
                raise AtlasError(f"{path} could not be read: {error}", hint="copy it again, or rebuild it") from None
    raise AtlasError(f"{path} changes faster than it can be read", hint="wait until it is written")


@contextmanager
def reopened(snapshot: Snapshot) -> Iterator[Atlas]:
    """The file of ``snapshot``, open again.

    Raises:
        AtlasError: It is not an atlas any more, or holds other FFNs by now.
    """
    with chanfmt.open(snapshot.path) as atlas:
        if _ffns(atlas)[0] != snapshot.ffns:
            raise AtlasError(f"{snapshot.path.name} holds other FFNs by now: r reads it again")
        yield atlas


def _ffns(atlas: Atlas) -> tuple[tuple[Ffn, ...], tuple[range, ...]]:
    """`Snapshot.ffns` and `Snapshot.blocks`."""
    ffns: list[Ffn] = []
    blocks: list[range] = []
    for block in atlas.blocks:
        blocks.append(range(len(ffns), len(ffns) + len(block.experts)))
        of, module = printable(block.stack), printable(block.module)
        ffns += [Ffn(block.layer_index, of, module, block.row, block.n_channels, expert) for expert in block.experts]
    return tuple(ffns), tuple(blocks)


def _read(atlas: Atlas, path: Path, stored: StoredArrays) -> Snapshot:
    if not atlas.blocks:
        raise AtlasError(f"{path} holds no FFN", hint=f"see: atlas info {path}")
    lp = {printable(name): stack["lp"] for name, stack in atlas.stacks.items()}
    if all(np.isnan(array).all() for array in lp.values()):
        raise AtlasError(f"{path} holds no measured LP: every value is NaN", hint="build it again")
    metrics: dict[str, Variable] = {}
    places: dict[tuple[str, str], Location] = {}
    for name, stack in atlas.stacks.items():
        held = stack.all_metrics
        metrics |= {printable(metric.name): metric for metric in held}
        places |= {(printable(name), printable(metric.name)): stack.location(metric.name) for metric in held}
        places |= {(printable(name), series): stack.location(series) for series in schema.SERIES if series in stack}
    order = list(schema.METRIC_BY_NAME)
    ffns, blocks = _ffns(atlas)
    return Snapshot(
        path=path,
        signature=stored.signature,
        read_at=datetime.now(),
        model_id=printable(atlas.model.id),
        status=printable(atlas.status),
        calibration_tokens=atlas.calibration.tokens,
        rho=atlas.labels.rho,
        metrics=dict(sorted(metrics.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))),
        ffns=ffns,
        blocks=blocks,
        lp=lp,
        labels={printable(name): stack["label"] for name, stack in atlas.stacks.items()},
        tokens={printable(name): stack["tokens"] for name, stack in atlas.stacks.items() if "tokens" in stack},
        supports={printable(name): stack.supports for name, stack in atlas.stacks.items()},
        places=places,
        stored=stored,
    )
