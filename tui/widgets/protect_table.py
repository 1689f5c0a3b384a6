"""The protect screen's table: the marked channels of every block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chanfmt.format import schema
from tui.widgets.ffn_table import FfnTable
from tui.widgets.line_table import Column
from tui.widgets.text import percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tui.session.load import Snapshot
    from tui.session.marks import Marks


class ProtectTable(FfnTable):
    """A row per block. A channel of an expert is named EXPERT:CHANNEL."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(snapshot, snapshot.blocks, marked="protected")
        self._rows: list[tuple[int, int, int, float, np.ndarray]] = []

    def show(self, snapshot: Snapshot, marks: Marks, ffn: int) -> None:
        """Show ``marks`` in the same order as before, with the cursor on ``ffn``."""
        self.snapshot, self.spans = snapshot, snapshot.blocks
        self._rows = [_row(snapshot, span, np.concatenate([marks.of(ffn) for ffn in span])) for span in self.spans]
        self.layout_columns()
        self.sort(ffn)

    def layout_columns(self) -> None:
        names = self.name_columns()
        used = 1 + sum(column.width + 1 for column in names) + sum(width + 1 for width in (9, 11, 8))
        self.set_columns(
            (
                *names,
                Column("protected", "protected", 9),
                Column("super", "of super", 11),
                Column("share", "LP share", 8),
                Column("channels", "channels", max(10, self.row_width - used - 1), at_left=True),
            ),
            1,
        )

    def cells(self, row: int, columns: Sequence[Column]) -> list[tuple[str, str]]:
        place = int(self.order[row])
        protected, core, supernodes, share, channels = self._rows[place]
        width = self.columns[-1].width
        names = self.name_texts(place)
        cells = {
            **{key: (text, "") for key, text in names.items()},
            "protected": (f"{protected:,}" if protected else "-", ""),
            "super": (f"{core:,}/{supernodes:,}", "super" if core else ""),
            "share": (percent(share), ""),
            # Every id takes two cells or more, so further ids would not be visible.
            "channels": (self._ids(place, channels[: width // 2])[:width], ""),
        }
        return [cells[column.key] for column in columns]

    def _ids(self, place: int, channels: np.ndarray) -> str:
        if len(self.spans[place]) == 1:
            return " ".join(map(str, channels.tolist()))
        width = self.snapshot.ffns[self.spans[place][0]].n_channels
        return " ".join(f"{channel // width}:{channel % width}" for channel in channels.tolist())

    def shown(self) -> dict[str, np.ndarray]:
        ids = np.array([self._ids(place, self._rows[place][4]) for place in self.order.tolist()])
        return super().shown() | {"channels": ids}

    def place_values(self, key: str) -> np.ndarray:
        field = {"protected": 0, "super": 1, "share": 3, "channels": 0}[key]
        return np.array([row[field] for row in self._rows])


def _row(snapshot: Snapshot, span: range, marked: np.ndarray) -> tuple[int, int, int, float, np.ndarray]:
    """Number of marked channels, of marked supernodes, and of supernodes; share of the LP that is marked; ids of the marked channels."""
    core = snapshot.span_labels(span) == schema.LABEL_SUPERNODE
    lp = np.nan_to_num(snapshot.span_values(span, "lp").astype(np.float64))
    total = float(lp.sum())
    share = float(lp[marked].sum()) / total if total > 0 else float("nan")
    return int(marked.sum()), int((core & marked).sum()), int(core.sum()), share, np.flatnonzero(marked)
