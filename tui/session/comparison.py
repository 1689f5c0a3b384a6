"""Two atlases of one architecture, compared FFN by FFN and joined channel by channel. Pure numpy and files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.algebra.compare import check_same_ffns, compare, label_settings_note, shared_text_note, special_tokens_note
from chanfmt.format import schema
from chanfmt.format.reader import Atlas
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
        first, second: The two atlases, by one metric.
        rows: One comparison per block of ``first``.
        counterparts: For each block of ``first``, the block of ``second``.
        notes: What a reader of the numbers must know.
    """

    first: Browser
    second: Browser
    rows: tuple[FFNComparison, ...]
    counterparts: tuple[range, ...]
    notes: tuple[Note, ...]

    def top_shares(self, place: int) -> tuple[float, float]:
        """Share of the metric's mass that the top channels of block ``place`` hold, in the first and in the second atlas."""
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
        """Second value over first value, float64 (channel,); NaN for a channel whose first value is not positive."""
        a, b = (ranking.values.astype(np.float64) for ranking in (self.first, self.second))
        return np.divide(b, a, out=np.full(len(a), np.nan), where=a > 0)

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Columns that a filter may compare: name to values, (channel,)."""
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
        """Words that a filter may use for supernodes: name to bool (channel,)."""
        first, second = (labels == schema.LABEL_SUPERNODE for labels in self.labels)
        return {"only-A": first & ~second, "only-B": second & ~first, "both": first & second}


def check_comparable(first: Path, second: Path) -> None:
    """Raise `AtlasError` if the two atlases are not of one architecture."""
    with Atlas.open(first) as one, Atlas.open(second) as other:
        check_same_ffns(one, other)


def make_comparison(first: Snapshot, second: Snapshot, metric: str) -> Comparison:
    """Compare two atlases by ``metric``.

    Raises:
        AtlasError: One of them lacks the metric, or they are not of one architecture.
    """
    with Atlas.open(first.path) as one, Atlas.open(second.path) as other:
        rows = tuple(compare(one, other, metric))
        found = (shared_text_note(one, other), special_tokens_note(one, other), label_settings_note(one, other))
        notes = tuple(note for note in found if note)
    # Both shares count the same number of channels. Otherwise their difference would come from the settings.
    pair = Browser(first, metric), Browser(replace(second, rho=first.rho), metric)
    return Comparison(*pair, rows, counterparts(first, second), notes)


def counterparts(first: Snapshot, second: Snapshot) -> tuple[range, ...]:
    """For each block of ``first``, the block of ``second`` that has the same module."""
    spans = {second.ffns[span[0]].module: span for span in second.blocks}
    return tuple(spans[first.ffns[span[0]].module] for span in first.blocks)


def join(comparison: Comparison, place: int) -> Joined:
    """The channels of block ``place`` in both atlases."""
    return joined(comparison.first, comparison.second, comparison.counterparts, place)


def joined(first: Browser, second: Browser, others: tuple[range, ...], place: int) -> Joined:
    """The channels of block ``place`` of ``first`` and of its counterpart among ``others``, the blocks of ``second``."""
    spans = first.snapshot.blocks[place], others[place]
    return Joined(
        first.ranking(spans[0]),
        second.ranking(spans[1]),
        (first.snapshot.span_labels(spans[0]), second.snapshot.span_labels(spans[1])),
    )
