"""What the compare screens show of two atlases of one architecture. Numpy, and `chanfmt.algebra.compare`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

import chanfmt
from chanfmt.algebra.compare import check_same_ffns, compare, label_settings_note, shared_text_note
from chanfmt.format import schema
from tui.session.model import Browser

if TYPE_CHECKING:
    from pathlib import Path

    from chanfmt.algebra.compare import FFNComparison, Note
    from tui.session import view
    from tui.session.load import Snapshot


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two atlases, FFN by FFN.

    Attributes:
        first, second: What is compared, by one metric.
        rows: One per block of ``first``.
        counterparts: The block of ``second`` for each of ``first``.
        notes: What a reader of the numbers must know.
    """

    first: Browser
    second: Browser
    rows: tuple[FFNComparison, ...]
    counterparts: tuple[range, ...]
    notes: tuple[Note, ...]

    def top_shares(self, place: int) -> tuple[float, float]:
        """Share of the top channels in both, of block ``place``."""
        pair = ((self.first, self.first.snapshot.blocks[place]), (self.second, self.counterparts[place]))
        first, second = (browser.summary(span).concentration.top_share for browser, span in pair)
        return first, second


@dataclass(frozen=True, eq=False)
class Joined:
    """The channels of one block in two atlases, (channel,) each."""

    first: view.Ranking
    second: view.Ranking
    labels: tuple[np.ndarray, np.ndarray]

    @property
    def ratio(self) -> np.ndarray:
        """Second over first, NaN where the first is not positive."""
        a, b = (ranking.values.astype(np.float64) for ranking in (self.first, self.second))
        return np.divide(b, a, out=np.full(len(a), np.nan), where=a > 0)

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """What a filter may compare: name to values, (channel,)."""
        first, second = self.first, self.second
        return {
            "channel": np.arange(len(first.rank)),
            "rank_a": first.rank,
            "rank_b": second.rank,
            "moved": second.rank - first.rank,
            "a": first.values,
            "b": second.values,
            "share_a": first.share,
            "share_b": second.share,
            "ratio": self.ratio,
        }

    @property
    def words(self) -> dict[str, np.ndarray]:
        """What a filter may ask about supernodes, bool (channel,)."""
        first, second = (labels == schema.LABEL_SUPERNODE for labels in self.labels)
        return {"only-A": first & ~second, "only-B": second & ~first, "both": first & second}


def check_comparable(first: Path, second: Path) -> None:
    """Raise `AtlasError` where the two are not of one architecture."""
    with chanfmt.open(first) as one, chanfmt.open(second) as other:
        check_same_ffns(one, other)


def make_comparison(first: Snapshot, second: Snapshot, metric: str) -> Comparison:
    """Compare by ``metric``. Raises `AtlasError` where one does not hold it, or the two cannot be compared."""
    with chanfmt.open(first.path) as one, chanfmt.open(second.path) as other:
        rows = tuple(compare(one, other, metric))
        notes = tuple(note for note in (shared_text_note(one, other), label_settings_note(one, other)) if note)
    # The share of as many channels in both: otherwise the difference would be one of the settings.
    pair = Browser(first, metric), Browser(replace(second, rho=first.rho), metric)
    return Comparison(*pair, rows, counterparts(first, second), notes)


def counterparts(first: Snapshot, second: Snapshot) -> tuple[range, ...]:
    """The block of ``second`` for each of ``first``."""
    spans = {second.ffns[span[0]].module: span for span in second.blocks}
    return tuple(spans[first.ffns[span[0]].module] for span in first.blocks)


def join(comparison: Comparison, place: int) -> Joined:
    """The channels of block ``place``."""
    return joined(comparison.first, comparison.second, comparison.counterparts, place)


def joined(first: Browser, second: Browser, others: tuple[range, ...], place: int) -> Joined:
    """The channels of block ``place`` of ``first`` and of its counterpart among ``others``."""
    spans = first.snapshot.blocks[place], others[place]
    return Joined(
        first.ranking(spans[0]),
        second.ranking(spans[1]),
        (first.snapshot.span_labels(spans[0]), second.snapshot.span_labels(spans[1])),
    )
