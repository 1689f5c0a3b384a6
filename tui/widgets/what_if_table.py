"""The what-if screen's table: what every block would keep."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from textual.binding import Binding, BindingType

from tui.widgets.ffn_table import FfnTable
from tui.widgets.line_table import Column
from tui.widgets.text import bar, percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from surgery.planning.what_if import Left
    from tui.session.load import Snapshot


class WhatIfTable(FfnTable):
    """A row per block. The keys that scroll columns in other tables set the sparsity in this one."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("h", "screen.step(-1)", "±1%", tooltip="one percent less (35{key}: 35%)", id="less"),
        Binding("left", "screen.step(-1)", "±1%", tooltip="one percent less (35{key}: 35%)"),
        Binding("l", "screen.step(1)", "±1%", tooltip="one percent more (35{key}: 35%)", id="more"),
        Binding("right", "screen.step(1)", "±1%", tooltip="one percent more (35{key}: 35%)"),
        Binding("H", "screen.step(-5)", "-5%", show=False, tooltip="five percent less", id="much-less"),
        Binding("L", "screen.step(5)", "+5%", show=False, tooltip="five percent more", id="much-more"),
    ]

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(snapshot, (), marked="lost")
        self.rows: tuple[Left, ...] = ()

    def show(self, snapshot: Snapshot, rows: tuple[Left, ...], ffn: int) -> None:
        """Show ``rows``, one per block or none, in the same order as before, with the cursor on ``ffn``."""
        self.snapshot, self.rows = snapshot, rows
        self.spans = snapshot.blocks if rows else ()
        self.layout_columns()
        self.sort(ffn)

    def layout_columns(self) -> None:
        bars = max(0, min(40, self.row_width - 62))
        self.set_columns(
            (
                *self.name_columns(),
                Column("kept", "kept ch", 9),
                Column("super", "super kept", 13),
                Column("lost", "super lost", 11),
                Column("lp", "LP mass kept", 13 + bars, at_left=True, scale="100%"),
            ),
            1,
        )

    def cells(self, row: int, columns: Sequence[Column]) -> list[tuple[str, str]]:
        place = int(self.order[row])
        left = self.rows[place]
        lost = left.supernodes - left.supernodes_kept
        share = _share(left)
        texts = {
            **{key: (text, "") for key, text in self.name_texts(place).items()},
            "kept": (f"{left.channels_kept:,}", ""),
            "super": (f"{left.supernodes_kept:,}/{left.supernodes:,}", ""),
            "lost": (f"{lost:,} lost" if lost else "-", "lost" if lost else ""),
        }
        return [texts.get(column.key) or (f"{percent(share):>6} {bar(share, column.width - 7)}", "") for column in columns]

    def place_values(self, key: str) -> np.ndarray:
        value = {
            "kept": lambda left: left.channels_kept,
            "super": lambda left: left.supernodes_kept,
            "lost": lambda left: left.supernodes - left.supernodes_kept,
            "lp": _share,
        }[key]
        return np.array([value(left) for left in self.rows])


def _share(left: Left) -> float:
    return float("nan") if left.lp_share is None else left.lp_share
