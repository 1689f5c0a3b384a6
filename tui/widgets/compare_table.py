"""The compare screen's table: the blocks of two atlases side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tui.widgets.ffn_table import FfnTable
from tui.widgets.line_table import Column
from tui.widgets.text import number, percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tui.session.comparison import Comparison
    from tui.session.load import Snapshot

BAR = 6
"""Cells for a bar on each side of zero."""


class CompareTable(FfnTable):
    """A row per block of the first atlas.

    Attributes:
        comparison: The numbers; None for no rows.
        as_ratio: Whether the change is a ratio. If not, it is a difference in percentage points.
        largest_change: Largest difference of the shares of any row, as a share; 0 without rows. The bars have this scale.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(snapshot, (), marked="jaccard")
        self.comparison: Comparison | None = None
        self.as_ratio = False
        self.largest_change = 0.0

    def show(self, snapshot: Snapshot, comparison: Comparison | None, ffn: int) -> None:
        """Show ``comparison`` (None: no rows) in the same order as before, with the cursor on ``ffn``."""
        self.snapshot, self.comparison = snapshot, comparison
        self.spans = comparison.first.snapshot.blocks if comparison else ()
        self.largest_change = _largest_change(comparison, len(self.spans)) if comparison else 0.0
        self.layout_columns()
        self.sort(ffn)

    def layout_columns(self) -> None:
        top = f"top{100 * self.snapshot.rho:g}%"
        self.set_columns(
            (
                *self.name_columns(),
                Column("first", f"A {top}", 7),
                Column("second", f"B {top}", 7),
                Column(
                    "change",
                    "B/A" if self.as_ratio else "B-A",
                    7 if self.as_ratio else 7 + 2 * BAR + 2,
                    at_left=not self.as_ratio,
                ),
                Column("correlation", "ρ", 5),
                Column("shared", "super∩", 6),
                Column("only_first", "only A", 6),
                Column("only_second", "only B", 6),
                Column("jaccard", "Jacc", 5),
                Column("chance", "chance", 7),
                Column("captured", "captured", 8),
                Column("halo", "halo Jacc", 9),
            ),
            1,
        )

    def cells(self, row: int, columns: Sequence[Column]) -> list[tuple[str, str]]:
        assert self.comparison is not None
        place = int(self.order[row])
        item = self.comparison.rows[place]
        first, second = self.comparison.top_shares(place)
        only_first, only_second = item.supernodes_first - item.supernodes_shared, item.supernodes_second - item.supernodes_shared
        texts = {
            **self.name_texts(place),
            "first": percent(first),
            "second": percent(second),
            "change": _ratio(second, first) if self.as_ratio else _change(second - first, self.largest_change),
            "correlation": _fraction(item.correlation),
            "shared": f"{item.supernodes_shared:,}",
            "only_first": f"{only_first:,}",
            "only_second": f"{only_second:,}",
            "jaccard": _fraction(item.supernode_jaccard),
            "chance": number(item.supernode_chance, 2),
            "captured": percent(item.captured),
            "halo": _fraction(item.halo_jaccard),
        }
        return [(texts[column.key], "lost" if column.key == "only_first" and only_first else "") for column in columns]

    def place_values(self, key: str) -> np.ndarray:
        if self.comparison is None:
            return np.zeros(0)
        rows = self.comparison.rows
        shares = np.array([self.comparison.top_shares(place) for place in range(len(rows))])
        if key in ("first", "second"):
            return shares[:, int(key == "second")]
        if key == "change":
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.asarray(shares[:, 1] / shares[:, 0] if self.as_ratio else shares[:, 1] - shares[:, 0])
        value = {
            "correlation": lambda item: item.correlation,
            "shared": lambda item: item.supernodes_shared,
            "only_first": lambda item: item.supernodes_first - item.supernodes_shared,
            "only_second": lambda item: item.supernodes_second - item.supernodes_shared,
            "jaccard": lambda item: item.supernode_jaccard,
            "chance": lambda item: item.supernode_chance,
            "captured": lambda item: item.captured,
            "halo": lambda item: item.halo_jaccard,
        }[key]
        return np.array([value(item) for item in rows])


def _largest_change(comparison: Comparison, rows: int) -> float:
    changes = np.abs([second - first for first, second in map(comparison.top_shares, range(rows))])
    return float(np.nanmax(changes)) if np.isfinite(changes).any() else 0.0


def _fraction(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"


def _ratio(value: float, base: float) -> str:
    return number(value / base) if base > 0 else "-"


def _change(points: float, largest: float) -> str:
    """A difference of shares in percentage points, with a bar to the left or right of a middle line; ``largest`` fills it."""
    if np.isnan(points):
        return f"{'-':>7}"
    cells = round(BAR * abs(points) / largest) if largest else 0
    left = "━" * cells if points < 0 else ""
    right = "━" * cells if points > 0 else ""
    return f"{100 * points:>+6.1f}% {left:>{BAR}}│{right:<{BAR}}"
