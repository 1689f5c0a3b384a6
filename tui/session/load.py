"""An atlas as the screens need it: structure, LP and labels in memory; the other metrics stay in the file until asked for."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.analysis.driving import ids_read, in_context
from chanfmt.base.errors import AtlasError
from chanfmt.base.files import PARTIAL_SUFFIX, partial_beside
from chanfmt.base.text import distinct_lines, one_line
from chanfmt.format import schema
from chanfmt.format.columns import ARRAY_BY_NAME, DRIVING_VALUE
from chanfmt.format.reader import Atlas
from tui.session.stored import StoredArrays

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from chanfmt.analysis.driving import DrivingToken
    from chanfmt.format.reader import Location, Stack
    from chanfmt.format.records import ModelRecord
    from chanfmt.format.schema import Variable

Signature = tuple[int, int, int]
WINDOW = 24
"""Tokens around a driving token: enough for a wide terminal."""
TRIES = 20
"""Attempts to read a file that another program keeps replacing."""


@dataclass(frozen=True)
class Ffn:
    """Channels that are ranked together: a dense FFN, or one expert."""

    layer_index: int
    stack: str
    module: str
    row: int
    n_channels: int
    expert: int | None = None

    @property
    def identity(self) -> tuple[int, str, int | None]:
        """What identifies the FFN in every atlas of the model."""
        return self.layer_index, self.module, self.expert

    def name(self, *, with_stack: bool) -> str:
        """The FFN in words."""
        stack = f" {self.stack}" if with_stack else ""
        return f"layer {self.layer_index}{stack}" + ("" if self.expert is None else f" expert {self.expert}")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What an atlas contained when it was read.

    Attributes:
        path: The file.
        signature: `file_signature` of the file that was read.
        read_at: When the file was read.
        model_id, model: The model's name in one line, and all that the file says about the model.
        metrics: Name to metric, for every metric that a stack has: metrics of the schema in its order, then other programs'.
        ffns: Every dense FFN and every expert, in model order.
        blocks: The blocks of the model as ranges of ``ffns``: one dense FFN, or all experts of a block.
        score: The metric that ranks the supernodes: ``lp``, unless the atlas holds none.
        lp: Stack to float32 (layer[, expert], channel); NaN if the atlas holds none.
        labels: Stack to uint8 (layer[, expert], channel).
        tokens: Stack to the number of tokens that reached each FFN, int64 (layer[, expert]); a stack without counts is left out.
        calibration_tokens: Tokens of the calibration text.
        sources: Names of the sources of the calibration text.
        seq_len: Tokens in a sequence of the calibration text.
        supports: Stack to the sizes of the write support for which ``connectivity_at`` has values.
        places: Stack and name (a metric, or one of `chanfmt.format.schema.SERIES`) to where the values are in the file.
        stored: The open file.
        ids_read: Stack to the token ids that its FFNs read, int32 (sequence, position), if it has driving tokens and the file holds
            tokens.
    """

    path: Path
    signature: Signature
    read_at: datetime
    model_id: str
    model: ModelRecord
    status: str
    calibration_tokens: int
    sources: tuple[str, ...]
    seq_len: int
    rho: float
    metrics: Mapping[str, Variable]
    ffns: tuple[Ffn, ...]
    blocks: tuple[range, ...]
    score: str
    lp: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray]
    supports: Mapping[str, tuple[int, ...]]
    places: Mapping[tuple[str, str], Location]
    stored: StoredArrays
    ids_read: Mapping[str, np.ndarray]

    @property
    def several_stacks(self) -> bool:
        return len(self.labels) > 1

    @property
    def has_experts(self) -> bool:
        return any(len(block) > 1 for block in self.blocks)

    def nearest(self, ffn: Ffn) -> int:
        """The FFN with the identity of ``ffn``, which may come from another atlas of the model.

        If there is none: the last FFN whose layer is not later.
        """
        place = self._places_of_ffns.get(ffn.identity)
        if place is None:
            place = max((place for place, own in enumerate(self.ffns) if own.layer_index <= ffn.layer_index), default=0)
        return place

    @cached_property
    def _places_of_ffns(self) -> dict[tuple[int, str, int | None], int]:
        return {ffn.identity: place for place, ffn in enumerate(self.ffns)}

    def block_of(self, ffn: int) -> int:
        """Number of the block that contains FFN ``ffn``."""
        return next(number for number, block in enumerate(self.blocks) if ffn in block)

    def block_around(self, ffn: int) -> range:
        """The block that contains FFN ``ffn``, as a range of FFNs."""
        return self.blocks[self.block_of(ffn)]

    def values(self, ffn: int, metric: str) -> np.ndarray:
        """``metric`` of FFN ``ffn``, floating point (channel,); all NaN if the stack lacks the metric."""
        place = self.ffns[ffn]
        return _one(self._row(place, metric), place)

    def value(self, ffn: int, channel: int, metric: str) -> float:
        """``metric`` of one channel; NaN if the stack lacks the metric."""
        place = self.ffns[ffn]
        location = self.places.get((place.stack, metric))
        if metric == "lp" or location is None:
            return float(self.values(ffn, metric)[channel])
        experts = () if place.expert is None else (place.expert,)
        return float(self.stored.fresh(location, place.row, *experts, channel))

    def stack_values(self, metric: str) -> dict[str, np.ndarray]:
        """Stack to ``metric`` of all its channels, floating point (layer[, expert], channel); NaN if a stack lacks the metric."""
        if metric == "lp":
            return dict(self.lp)
        return {
            stack: np.full(lp.shape, np.nan, dtype=np.float32)
            if (location := self.places.get((stack, metric))) is None
            else self.stored.fresh(location)
            for stack, lp in self.lp.items()
        }

    def span_values(self, span: range, metric: str) -> np.ndarray:
        """``metric`` of every channel of ``span``, which is one FFN or a whole block, floating point (channels,)."""
        place = self.ffns[span[0]]
        return self.values(span[0], metric) if len(span) == 1 else self._row(place, metric).ravel()

    def labels_of(self, ffn: int) -> np.ndarray:
        """Labels of FFN ``ffn``, uint8 (channel,)."""
        place = self.ffns[ffn]
        return _one(self.labels[place.stack][place.row], place)

    def span_labels(self, span: range) -> np.ndarray:
        """Labels of every channel of ``span``, which is one FFN or a whole block, uint8 (channels,)."""
        place = self.ffns[span[0]]
        return self.labels_of(span[0]) if len(span) == 1 else self.labels[place.stack][place.row].ravel()

    def tokens_of(self, ffn: int) -> int | None:
        """Number of tokens that reached FFN ``ffn``; None if the file does not say."""
        place = self.ffns[ffn]
        tokens = self.tokens.get(place.stack)
        return None if tokens is None else int(tokens[place.row] if place.expert is None else tokens[place.row, place.expert])

    def series(self, ffn: int, name: str) -> np.ndarray | None:
        """One of `chanfmt.format.schema.SERIES` for FFN ``ffn``, (n,) or (n, channel); None if the stack lacks it."""
        place = self.ffns[ffn]
        location = self.places.get((place.stack, name))
        if location is None:
            return None
        index = (place.row,) if place.expert is None else (place.row, place.expert)
        return np.stack([self.stored.at(location, step, *index) for step in range(location.shape[0])])

    def driving(self, ffn: int, channel: int) -> tuple[DrivingToken, ...]:
        """The tokens that drive ``channel`` of FFN ``ffn`` hardest; none if the stack does not have them."""
        place = self.ffns[ffn]
        if (place.stack, DRIVING_VALUE) not in self.places:
            return ()
        index = (place.row, *(() if place.expert is None else (place.expert,)), channel)
        value, *where = (self.stored.fresh(self.places[place.stack, name], *index) for name in ARRAY_BY_NAME)
        # A file that another program has made shorter has no numbers.
        sequence, position = (np.nan_to_num(values, nan=-1) for values in where)
        return in_context(value, sequence, position, self.ids_read.get(place.stack), window=WINDOW)

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
    """Time, size and inode of the file: at least one changes if the file is replaced or written. Raises `OSError`."""
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size, status.st_ino


def present_file(path: Path) -> Path:
    """The file to read for ``path``.

    If ``path`` does not exist: the partial atlas of the build that will write ``path``, or, if ``path`` is a partial atlas,
    the finished atlas. If neither exists, ``path``.
    """
    # Unlike methods of Path, these functions answer False for a folder that may not be read. Opening the file says why.
    if os.path.exists(path):
        return path
    finished = path.with_name(path.name.removesuffix(PARTIAL_SUFFIX))
    other = finished if path.name.endswith(PARTIAL_SUFFIX) else partial_beside(path)
    return other if os.path.isfile(other) else path


def read_snapshot(path: str | Path, *, contained: bool = False) -> Snapshot:
    """Read the file that `present_file` finds for ``path``; ``contained`` is as in `Atlas.open`.

    Raises:
        AtlasError: The file is not a readable atlas, or has nothing to show.
    """
    path = present_file(Path(path))
    for _ in range(TRIES):
        with Atlas.open(path, contained=contained) as atlas:
            try:
                stored = StoredArrays(path)
                snapshot = _read(atlas, path, stored)
                # If the signatures differ, another program has replaced the file since we opened it.
                if file_signature(path) == stored.signature:
                    return snapshot
            except (OSError, RuntimeError) as error:
                raise AtlasError(f"{path} could not be read: {error}", hint="copy it again, or rebuild it") from None
    raise AtlasError(f"{path} changes faster than it can be read", hint="wait until it has been written")


@contextmanager
def reopened(snapshot: Snapshot) -> Iterator[Atlas]:
    """Open the file of ``snapshot`` again.

    Raises:
        AtlasError: The file is no longer an atlas, or its FFNs have changed.
    """
    with Atlas.open(snapshot.path) as atlas:
        if _ffns(atlas)[0] != snapshot.ffns:
            raise AtlasError(f"the FFNs in {snapshot.path.name} have changed: read it again")
        yield atlas


def _ffns(atlas: Atlas) -> tuple[tuple[Ffn, ...], tuple[range, ...]]:
    """`Snapshot.ffns` and `Snapshot.blocks`."""
    ffns: list[Ffn] = []
    blocks: list[range] = []
    stacks, modules = distinct_lines(atlas.stacks), distinct_lines(block.module for block in atlas.blocks)
    for block in atlas.blocks:
        blocks.append(range(len(ffns), len(ffns) + len(block.experts)))
        of, module = stacks[block.stack], modules[block.module]
        ffns += [Ffn(block.layer_index, of, module, block.row, block.n_channels, expert) for expert in block.experts]
    return tuple(ffns), tuple(blocks)


def _read(atlas: Atlas, path: Path, stored: StoredArrays) -> Snapshot:
    if not atlas.blocks:
        raise AtlasError(f"{path} has no FFNs", hint=f"see: atlas info {path}")
    stacks = {shown: atlas.stacks[name] for name, shown in distinct_lines(atlas.stacks).items()}
    score = "lp" if any("lp" in stack for stack in stacks.values()) else atlas.labels.score
    if all(score not in stack or np.isnan(stack[score]).all() for stack in stacks.values()):
        name = schema.METRIC_BY_NAME[score].heading if score in schema.METRIC_BY_NAME else one_line(score)
        raise AtlasError(f"{path} has no measured {name}: every value is NaN", hint="build it again")
    # An atlas of activations alone, such as an imported importance matrix, has no LP.
    lp = {
        name: stack["lp"] if score == "lp" else np.full(stack["label"].shape, np.nan, dtype=np.float32)
        for name, stack in stacks.items()
    }
    held = {metric.name: metric for stack in stacks.values() for metric in stack.all_metrics}
    shown, order = distinct_lines(held), list(schema.METRIC_BY_NAME)
    ordered = sorted(held, key=lambda name: order.index(name) if name in order else len(order))
    places: dict[tuple[str, str], Location] = {}
    for name, stack in stacks.items():
        places |= {(name, shown[metric.name]): stack.location(metric.name) for metric in stack.all_metrics}
        places |= {(name, series): stack.location(series) for series in (*schema.SERIES, *ARRAY_BY_NAME) if series in stack}
    ffns, blocks = _ffns(atlas)
    return Snapshot(
        path=path,
        signature=stored.signature,
        read_at=datetime.now(),
        model_id=one_line(atlas.model.id),
        model=atlas.model,
        status=one_line(atlas.status),
        calibration_tokens=atlas.calibration.tokens,
        sources=tuple(one_line(contribution.source) for contribution in atlas.calibration.contributions),
        seq_len=atlas.calibration.seq_len,
        rho=atlas.labels.rho,
        metrics={shown[name]: held[name] for name in ordered},
        ffns=ffns,
        blocks=blocks,
        score=score,
        lp=lp,
        labels={name: stack["label"] for name, stack in stacks.items()},
        tokens={name: stack["tokens"] for name, stack in stacks.items() if "tokens" in stack},
        supports={name: stack.supports for name, stack in stacks.items()},
        places=places,
        stored=stored,
        ids_read=_ids_read(atlas, stacks),
    )


def _ids_read(atlas: Atlas, stacks: Mapping[str, Stack]) -> dict[str, np.ndarray]:
    """`Snapshot.ids_read`. ``stacks`` has the stacks by the names shown."""
    places = {block.stack: block.place for block in atlas.blocks}
    found = {
        name: ids_read(atlas.calibration, places[stack.name])
        for name, stack in stacks.items()
        if DRIVING_VALUE in stack and stack.name in places
    }
    return {name: ids for name, ids in found.items() if ids is not None}
