"""The browser: a snapshot, a metric and an axis, with everything computed from them cached."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.analysis.strip import strip_levels, strip_shares
from chanfmt.base.text import one_line
from tui.session import view

if TYPE_CHECKING:
    from tui.session.load import Snapshot


class Browser:
    """What every screen shows. A new snapshot or metric makes a new `Browser`; the axis may change in place.

    A ``span`` is a range of the snapshot's FFNs: one FFN, or a whole block.

    Attributes:
        snapshot: The atlas as read.
        metric: Name of the metric shown.
        log_axis: Whether the x axis of strips and curves is the logarithm of the rank. If not, the axis of strips is the
            channel index, and the axis of curves is the rank.
    """

    def __init__(self, snapshot: Snapshot, metric: str = "lp", *, log_axis: bool = True) -> None:
        self.snapshot = snapshot
        self.metric = metric if metric in snapshot.metrics else snapshot.score
        self.log_axis = log_axis
        self._summaries: dict[range, view.Summary] = {}
        self._rankings: dict[range, view.Ranking] = {}

    @property
    def heading(self) -> str:
        """The metric's column heading."""
        return one_line(self.snapshot.metrics[self.metric].heading)

    def summary(self, span: range) -> view.Summary:
        """Mass, concentration and labels of ``span``."""
        if span not in self._summaries:
            snapshot = self.snapshot
            self._summaries[span] = view.summarize(
                snapshot.span_values(span, self.metric), snapshot.span_labels(span), snapshot.rho
            )
        return self._summaries[span]

    @property
    def summaries(self) -> tuple[view.Summary, ...]:
        """One summary per block."""
        return tuple(map(self.summary, self.snapshot.blocks))

    @cached_property
    def mass(self) -> float:
        """Sum of the metric over every FFN that has the metric."""
        return float(np.nansum([summary.concentration.mass for summary in self.summaries]))

    @property
    def top_heading(self) -> str:
        """Column heading for the share of the top channels."""
        return f"top{100 * self.snapshot.rho:g}%"

    def ranking(self, span: range) -> view.Ranking:
        """The channels of ``span`` by the metric. The last few rankings are kept."""
        if span not in self._rankings:
            if len(self._rankings) >= 8:
                self._rankings.pop(next(iter(self._rankings)))
            self._rankings[span] = view.ranking(self.snapshot.span_values(span, self.metric))
        return self._rankings[span]

    def columns(self, ffn: int) -> dict[str, np.ndarray]:
        """Columns of FFN ``ffn`` that a filter may compare: name to values, (channel,)."""
        ranking = self.ranking(range(ffn, ffn + 1))
        metrics = {name: self.snapshot.values(ffn, name) for name in self.snapshot.metrics}
        return {
            "rank": ranking.rank,
            "channel": np.arange(len(ranking.rank)),
            "share": ranking.share,
            "cumulative": ranking.cumulative,
            **metrics,
        }

    def strip(self, span: range, samples: int, steps: int) -> np.ndarray:
        """Levels 0 to ``steps`` of the heat strip of ``span``, int64 (samples,)."""
        values = self.snapshot.span_values(span, self.metric)
        return strip_levels(strip_shares(values, samples, log=self.log_axis), len(values), steps)
