"""What the tables with a row per FFN, block or expert have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.cells import cell_len

from tui.session import view
from tui.widgets.line_table import Column, LineTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tui.session.load import Snapshot


class FfnTable(LineTable):
    """A row per span of FFNs. A ``place`` is the index of a span in model order.

    Attributes:
        snapshot: The atlas.
        spans: The FFNs of every place, as ranges of the snapshot's FFNs.
        of_experts: Whether the rows are the experts of one block.
        order: Row to place, int64 (row,).
    """

    def __init__(self, snapshot: Snapshot, spans: Sequence[range], *, marked: str, of_experts: bool = False) -> None:
        super().__init__(sort_key="layer", descending=False, marked=marked)
        self.snapshot = snapshot
        self.spans = tuple(spans)
        self.of_experts = of_experts
        self.order = np.zeros(0, dtype=np.int64)

    # What subclasses define.

    def layout_columns(self) -> None:
        """Choose columns that suit the width."""
        raise NotImplementedError

    def place_values(self, key: str) -> np.ndarray:
        """Values by which the column ``key`` sorts, (place,). ``key`` is not one of `name_columns`."""
        raise NotImplementedError

    # What screens use.

    @property
    def place(self) -> int:
        """The place under the cursor."""
        return int(self.order[self.cursor])

    @property
    def span(self) -> range:
        """The FFNs under the cursor."""
        return self.spans[self.place]

    def show_ffn(self, ffn: int) -> None:
        """Put the cursor on the row of ``ffn``, if ``ffn`` has a row."""
        row = self._row_of(ffn)
        if row is not None:
            self.go_to(row)

    def sort(self, ffn: int | None = None) -> None:
        """Sort the rows, and put the cursor on the row of ``ffn`` or else on the first row."""
        self.order = view.order_by(self._sort_values(), descending=self.descending)
        self.set_rows(len(self.order), 0 if ffn is None else self._row_of(ffn) or 0)

    def shown(self) -> dict[str, np.ndarray]:
        ffns = [self.snapshot.ffns[span[0]] for span in self.spans]
        names = {"layer": np.array([ffn.layer_index for ffn in ffns]), "stack": np.array([ffn.stack for ffn in ffns])}
        if self.of_experts:
            names["expert"] = np.array([ffn.expert for ffn in ffns])
        values = {column.key: self.place_values(column.key) for column in self.columns if column.key not in ("layer", "stack")}
        return {name: column[self.order] for name, column in (names | values).items()}

    def on_resize(self) -> None:
        self.layout_columns()
        super().on_resize()

    # What subclasses use.

    def name_columns(self) -> list[Column]:
        """Columns that name a row."""
        if self.of_experts:
            return [Column("layer", "expert", 6)]
        stacks = self.snapshot.labels
        return [
            Column("layer", "layer", 6),
            *([Column("stack", "stack", max(6, *map(cell_len, stacks)))] if len(stacks) > 1 else []),
        ]

    def name_texts(self, place: int) -> dict[str, str]:
        """Cells of `name_columns`."""
        ffn = self.snapshot.ffns[self.spans[place][0]]
        return {"layer": str(ffn.expert if self.of_experts else ffn.layer_index), "stack": ffn.stack}

    def _sort_values(self) -> np.ndarray:
        ffns = [self.snapshot.ffns[span[0]] for span in self.spans]
        if self.sort_key == "layer":
            return np.array([ffn.expert if self.of_experts else ffn.layer_index for ffn in ffns])
        if self.sort_key == "stack":
            names = sorted(self.snapshot.labels)
            return np.array([names.index(ffn.stack) for ffn in ffns])
        return self.place_values(self.sort_key)

    def _row_of(self, ffn: int) -> int | None:
        place = next((place for place, span in enumerate(self.spans) if ffn in span), None)
        rows = np.flatnonzero(self.order == place)
        return int(rows[0]) if place is not None and len(rows) else None
