"""The what-if screen's table: what every FFN would keep."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from textual.binding import Binding, BindingType

from tui import view
from tui.text import bar, percent
from tui.widgets.line_table import Column, LineTable

if TYPE_CHECKING:
    from surgery.what_if import Left
    from tui.load import Snapshot


class WhatIfTable(LineTable):
    """FFNs in the order asked for; ``order`` maps rows to FFNs. The keys that scroll columns elsewhere set the sparsity."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("h,left", "screen.step(-1)", "±1%", tooltip="one percent less (35h: 35%)"),
        Binding("l,right", "screen.step(1)", "±1%", tooltip="one percent more (35l: 35%)"),
        Binding("H", "screen.step(-5)", "-5%", show=False, tooltip="five percent less"),
        Binding("L", "screen.step(5)", "+5%", show=False, tooltip="five percent more"),
    ]

    def __init__(self) -> None:
        super().__init__(sort_key="layer", descending=False, marked="lost")
        self.snapshot: Snapshot | None = None
        self.rows: tuple[Left, ...] = ()
        self.order = np.zeros(0, dtype=np.int64)

    @property
    def ffn(self) -> int:
        """The FFN under the cursor."""
        return int(self.order[self.cursor])

    def show(self, snapshot: Snapshot, rows: tuple[Left, ...], ffn: int) -> None:
        """Show what stays (nothing: no row), sorted as before, the cursor on ``ffn``."""
        self.snapshot, self.rows = snapshot, rows
        self.layout_columns()
        self.sort(ffn)

    def sort(self, ffn: int | None = None) -> None:
        """Put the rows in order and the cursor on ``ffn``, or else on top."""
        self.order = view.order_by(self._sort_values(), descending=self.descending)
        place = np.flatnonzero(self.order == ffn)
        self.set_rows(len(self.order), int(place[0]) if len(place) else 0)

    def layout_columns(self) -> None:
        """Choose columns for the width."""
        if self.snapshot is None:
            return
        bars = max(0, min(40, self.row_width - 62))
        stacks = self.snapshot.labels
        self.set_columns((
            Column("layer", "layer", 6),
            *([Column("stack", "stack", max(6, *map(len, stacks)))] if len(stacks) > 1 else []),
            Column("kept", "kept ch", 9), Column("super", "super kept", 13), Column("lost", "super lost", 11),
            Column("lp", "LP mass kept", 13 + bars),
        ), 1)

    def on_resize(self) -> None:
        self.layout_columns()
        super().on_resize()

    def cells(self, row: int) -> list[tuple[str, str]]:
        assert self.snapshot is not None
        left, ffn = self.rows[int(self.order[row])], self.snapshot.ffns[int(self.order[row])]
        lost = left.supernodes - left.supernodes_kept
        share = _share(left)
        texts = {
            "layer": (str(ffn.layer_index), ""), "stack": (ffn.stack, ""), "kept": (f"{left.channels_kept:,}", ""),
            "super": (f"{left.supernodes_kept:,}/{left.supernodes:,}", ""),
            "lost": (f"{lost:,} lost" if lost else "-", "super" if lost else ""),
        }
        return [texts.get(column.key) or (f"{percent(share):>6} {bar(share, column.width - 7)}", "") for column in self.columns]

    def _sort_values(self) -> np.ndarray:
        assert self.snapshot is not None
        if not self.rows:
            return np.zeros(0)
        if self.sort_key == "layer":
            return np.array([ffn.layer_index for ffn in self.snapshot.ffns])
        if self.sort_key == "stack":
            names = sorted(self.snapshot.labels)
            return np.array([names.index(ffn.stack) for ffn in self.snapshot.ffns])
        value = {
            "kept": lambda left: left.channels_kept, "super": lambda left: left.supernodes_kept,
            "lost": lambda left: left.supernodes - left.supernodes_kept, "lp": _share,
        }[self.sort_key]
        return np.array([value(left) for left in self.rows])


def _share(left: Left) -> float:
    return float("nan") if left.lp_share is None else left.lp_share
