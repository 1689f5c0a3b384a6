"""Computations from arrays for the screens: summaries, orders, strips, searches. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.analysis.mass import Concentration, concentration
from chanfmt.analysis.strip import bin_edges, cumulative
from chanfmt.format import schema

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tui.session.load import Snapshot

LABEL_TEXT = {schema.LABEL_NONE: "·", schema.LABEL_HALO: "halo", schema.LABEL_SUPERNODE: "SUPER"}


@dataclass(frozen=True)
class Summary:
    """One row of the overview. ``known`` is the number of channels whose value is not NaN."""

    concentration: Concentration
    supernodes: int
    halo: int
    known: int


@dataclass(frozen=True, eq=False)
class Ranking:
    """One layer's channels by one metric.

    Attributes:
        values: The metric, floating point (channel,).
        order: Channels by descending value, ties by ascending index, NaN last, int64 (channel,).
        rank: 1-based position of every channel in ``order``, int64 (channel,).
        share: Share of the layer's mass in every channel, (channel,); NaN if the value is NaN.
        cumulative: Share of the mass in the channels up to and including this one in ``order``, (channel,).
        curve: ``cumulative`` by rank with a leading zero, float64 (channel + 1,), never NaN.
    """

    values: np.ndarray
    order: np.ndarray
    rank: np.ndarray
    share: np.ndarray
    cumulative: np.ndarray
    curve: np.ndarray


def summarize(values: np.ndarray, labels: np.ndarray, rho: float) -> Summary:
    """`Summary` of one layer over the channels whose value is finite."""
    known = values[np.isfinite(values)]
    measured = concentration(known, rho) if len(known) else Concentration(*[float("nan")] * 5)
    return Summary(
        measured,
        int((labels == schema.LABEL_SUPERNODE).sum()),
        int((labels == schema.LABEL_HALO).sum()),
        len(known),
    )


def order_by(values: np.ndarray, *, descending: bool) -> np.ndarray:
    """Stable order of ``values`` (n,), int64 (n,); NaN comes last both ways."""
    keys = values.astype(np.int64) if values.dtype.kind in "iub" else values
    return np.argsort(-keys if descending else keys, kind="stable")


def ranking(values: np.ndarray) -> Ranking:
    """`Ranking` of one layer's ``values`` (channel,)."""
    order = order_by(values, descending=True)
    rank = np.empty(len(values), dtype=np.int64)
    rank[order] = np.arange(1, len(values) + 1)
    known = np.isfinite(values)
    curve = cumulative(np.where(known, values, 0)[order])
    total = float(values[known].sum(dtype=np.float64))
    share = values / total if total > 0 else np.where(known, 0.0, np.nan)
    return Ranking(values, order, rank, share, np.where(known, curve[rank], np.nan), curve)


def curve_samples(curve: np.ndarray, samples: int, *, log: bool) -> np.ndarray:
    """`Ranking.curve` at the right edge of every bin, (samples,)."""
    edges = bin_edges(len(curve) - 1, samples, log=log)[1:]
    return np.interp(edges, np.arange(len(curve)), curve)


def row_of(order: np.ndarray, channel: int | None, otherwise: int) -> int:
    """The row of ``channel`` in ``order`` (row,); ``otherwise`` if ``channel`` is None or has no row."""
    rows = np.flatnonzero(order == (-1 if channel is None else channel))
    return int(rows[0]) if len(rows) else otherwise


def match_spans(snapshot: Snapshot, spans: Sequence[range], query: str, *, of_experts: bool = False) -> np.ndarray:
    """Spans of FFNs that ``query`` names, bool (span,).

    ``query`` is a layer index (``11`` or ``L11``), or part of the name of a stack or module. With ``of_experts``, a number is
    the index of an expert.
    """
    ffns = [snapshot.ffns[span[0]] for span in spans]
    number = query.lower().removeprefix("layer").removeprefix("l").strip()
    if number.isdecimal():
        return np.array([ffn.expert if of_experts else ffn.layer_index for ffn in ffns]) == int(number)
    lowered = query.lower()
    return np.array([lowered in f"{ffn.stack} {ffn.module}".lower() for ffn in ffns])


def match_channels(labels: np.ndarray, query: str) -> np.ndarray:
    """Channels that ``query`` names, bool (channel,). ``query`` is a channel id, or the beginning of a label's name."""
    if query.isdecimal():
        return np.arange(len(labels)) == int(query)
    wanted = [value for value, name in schema.LABELS.items() if name.startswith(query.lower())]
    return np.isin(labels, wanted)


def next_match(matches: np.ndarray, start: int, step: int) -> int | None:
    """Index of the next true entry of ``matches`` (n,) after ``start``, going round; None if no entry is true."""
    places = np.flatnonzero(matches)
    if not len(places):
        return None
    ahead = (places - start) * step
    ahead = np.where(ahead > 0, ahead, ahead + len(matches))
    return int(places[np.argmin(ahead)])
