"""What the compare screens show of two atlases of one architecture. Numpy, and `chanfmt.compare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import chanfmt
from chanfmt import schema
from chanfmt.compare import check_same_ffns, compare

if TYPE_CHECKING:
    from pathlib import Path

    from chanfmt.compare import FFNComparison
    from tui import view
    from tui.model import Browser


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two atlases, FFN by FFN.

    Attributes:
        first, second: What is compared, by one metric.
        rows: One per block of ``first``.
        counterparts: The block of ``second`` for each of ``first``.
    """

    first: Browser
    second: Browser
    rows: tuple[FFNComparison, ...]
    counterparts: tuple[range, ...]

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
    def words(self) -> dict[str, np.ndarray]:
        """What a filter may ask about supernodes, bool (channel,)."""
        first, second = (labels == schema.LABEL_SUPERNODE for labels in self.labels)
        return {"only-A": first & ~second, "only-B": second & ~first, "both": first & second}


def check_comparable(first: Path, second: Path) -> None:
    """Raise `AtlasError` where the two are not of one architecture."""
    with chanfmt.open(first) as one, chanfmt.open(second) as other:
        check_same_ffns(one, other)


def make_comparison(first: Browser, second: Browser) -> Comparison:
    """Compare by the metric of ``first``. Raises `AtlasError` where the two cannot be."""
    with chanfmt.open(first.snapshot.path) as one, chanfmt.open(second.snapshot.path) as other:
        rows = tuple(compare(one, other, first.metric))
    spans = {second.snapshot.ffns[span[0]].module: span for span in second.snapshot.blocks}
    counterparts = tuple(spans[first.snapshot.ffns[span[0]].module] for span in first.snapshot.blocks)
    return Comparison(first, second, rows, counterparts)


def join(comparison: Comparison, place: int) -> Joined:
    """The channels of block ``place``."""
    first, second = comparison.first, comparison.second
    spans = first.snapshot.blocks[place], comparison.counterparts[place]
    return Joined(first.ranking(spans[0]), second.ranking(spans[1]),
                  (first.snapshot.span_labels(spans[0]), second.snapshot.span_labels(spans[1])))
