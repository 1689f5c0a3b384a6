"""What is being looked at: the snapshot, the metric and the axis, with what follows from them cached."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.schema import METRIC_BY_NAME
from tui import view

if TYPE_CHECKING:
    from tui.load import Snapshot


class Browser:
    """State shared by the screens. A new snapshot or metric makes a new `Browser`; the axis may change.

    Attributes:
        snapshot: The atlas as read.
        metric: Name of the metric shown.
        log_axis: Whether strips and curves run by log rank rather than by index or linear rank.
    """

    def __init__(self, snapshot: Snapshot, metric: str = "lp", *, log_axis: bool = True) -> None:
        self.snapshot = snapshot
        self.metric = metric if metric in snapshot.metrics else "lp"
        self.log_axis = log_axis
        self._rankings: dict[int, view.Ranking] = {}

    @property
    def heading(self) -> str:
        """The metric's column heading."""
        return METRIC_BY_NAME[self.metric].heading

    @cached_property
    def summaries(self) -> tuple[view.Summary, ...]:
        """One per FFN."""
        snapshot = self.snapshot
        return tuple(
            view.summarize(snapshot.values(ffn, self.metric), snapshot.labels_of(ffn), snapshot.rho)
            for ffn in range(len(snapshot.ffns))
        )

    @cached_property
    def mass(self) -> float:
        """The metric's sum over every FFN that has one."""
        return float(np.nansum([summary.concentration.mass for summary in self.summaries]))

    @property
    def top_heading(self) -> str:
        return f"top{100 * self.snapshot.rho:g}%"

    def ranking(self, ffn: int) -> view.Ranking:
        """The FFN's channels by the metric; the last few are kept."""
        if ffn not in self._rankings:
            if len(self._rankings) >= 8:
                self._rankings.pop(next(iter(self._rankings)))
            self._rankings[ffn] = view.ranking(self.snapshot.values(ffn, self.metric))
        return self._rankings[ffn]

    def strip(self, ffn: int, samples: int, steps: int) -> np.ndarray:
        """Levels 0..``steps`` of the FFN's heat strip, (samples,)."""
        values = self.snapshot.values(ffn, self.metric)
        return view.strip_levels(view.strip_shares(values, samples, log=self.log_axis), len(values), steps)
