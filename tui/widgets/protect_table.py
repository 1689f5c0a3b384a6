"""The protect screen's table: marked channels per FFN."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chanfmt import schema
from tui import view
from tui.text import percent
from tui.widgets.line_table import Column, LineTable

if TYPE_CHECKING:
    from tui.load import Snapshot
    from tui.marks import Marks


class ProtectTable(LineTable):
    """FFNs in the order asked for; ``order`` maps rows to FFNs."""

    def __init__(self) -> None:
        super().__init__(sort_key="layer", descending=False, marked="protected")
        self.order = np.zeros(0, dtype=np.int64)
        self._snapshot: Snapshot | None = None
        self._rows: list[tuple[int, int, int, float, np.ndarray]] = []

    @property
    def ffn(self) -> int:
        """The FFN under the cursor."""
        return int(self.order[self.cursor])

    def show(self, snapshot: Snapshot, marks: Marks, ffn: int) -> None:
        """Show ``marks``, sorted as before, the cursor on ``ffn``."""
        self._snapshot = snapshot
        self._rows = [_row(snapshot, number, marks.of(number)) for number in range(len(snapshot.ffns))]
        self.layout_columns()
        self.sort(ffn)

    def sort(self, ffn: int | None = None) -> None:
        """Put the rows in order and the cursor on ``ffn``, or else on top."""
        assert self._snapshot is not None
        if self.sort_key == "layer":
            values = np.arange(len(self._rows))
        else:
            place = {"protected": 0, "super": 1, "share": 3, "channels": 0}[self.sort_key]
            values = np.array([row[place] for row in self._rows])
        self.order = view.order_by(values, descending=self.descending)
        self.set_rows(len(self.order), 0 if ffn is None else int(np.flatnonzero(self.order == ffn)[0]))

    def layout_columns(self) -> None:
        """Choose columns for the width."""
        if self._snapshot is None:
            return
        several = self._snapshot.several_stacks
        name = 6 if not several else 7 + max(map(len, self._snapshot.labels))
        used = 1 + sum(width + 1 for width in (name, 9, 11, 8))
        self.set_columns((
            Column("layer", "layer", name), Column("protected", "protected", 9), Column("super", "of super", 11),
            Column("share", "LP share", 8), Column("channels", "channels", max(10, self.row_width - used - 1)),
        ), 1)

    def on_resize(self) -> None:
        self.layout_columns()
        super().on_resize()

    def cells(self, row: int) -> list[tuple[str, str]]:
        assert self._snapshot is not None
        ffn = int(self.order[row])
        protected, core, supernodes, share, channels = self._rows[ffn]
        place = self._snapshot.ffns[ffn]
        width = self.columns[-1].width
        # More ids than fit are cut, so no more of them are made into text.
        ids = " ".join(map(str, channels[: width // 2].tolist()))
        return [
            (f"{place.layer_index} {place.stack}" if self._snapshot.several_stacks else str(place.layer_index), ""),
            (f"{protected:,}" if protected else "-", ""), (f"{core:,}/{supernodes:,}", "super" if core else ""),
            (percent(share), ""), (ids[:width].ljust(width), ""),
        ]


def _row(snapshot: Snapshot, ffn: int, marked: np.ndarray) -> tuple[int, int, int, float, np.ndarray]:
    """Marked channels, supernodes among them, supernodes, share of LP that is marked, and the channels' ids."""
    core = snapshot.labels_of(ffn) == schema.LABEL_SUPERNODE
    lp = np.nan_to_num(snapshot.values(ffn, "lp").astype(np.float64))
    total = float(lp.sum())
    share = float(lp[marked].sum()) / total if total > 0 else float("nan")
    return int(marked.sum()), int((core & marked).sum()), int(core.sum()), share, np.flatnonzero(marked)
