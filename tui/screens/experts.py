"""The experts of one block."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding, BindingType

from tui.screens.base import BACK_BINDINGS, METRIC_BINDINGS, common_bindings
from tui.screens.layers import LayerTableScreen
from tui.widgets.layer_table import LayerTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tui.session.place import Opening, Place
    from tui.session.session import Session


class ExpertsScreen(LayerTableScreen):
    """The experts of one block."""

    SCREEN = "experts"
    FIND_HINT = "expert number"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "expert", tooltip="open the expert", id="open"),
        Binding("left_square_bracket", "neighbour(-1)", "layer", tooltip="previous layer with experts", id="previous-layer"),
        Binding("right_square_bracket", "neighbour(1)", "layer", tooltip="next layer with experts", id="next-layer"),
        *METRIC_BINDINGS,
        *common_bindings("experts"),
        *BACK_BINDINGS,
    ]

    def __init__(self, session: Session, opening: Opening) -> None:
        super().__init__(session, LayerTable(session.browser, (), session.front.ramp, of_experts=True), opening.ffn)

    def spans(self) -> Sequence[range]:
        return [range(ffn, ffn + 1) for ffn in self._block()]

    @property
    def place(self) -> Place:
        return replace(super().place, expert=self.browser.snapshot.ffns[self.ffn].expert)

    def _block(self) -> range:
        return self.browser.snapshot.block_around(self.ffn)

    def show_ffn(self, ffn: int) -> None:
        """Put the cursor on ``ffn``, and show the experts of its block."""
        if ffn not in self._block():
            self._to(ffn)
        super().show_ffn(ffn)

    def come_back(self, span: range) -> None:
        if len(self.browser.snapshot.block_around(span[0])) == 1:
            # The user has walked from an expert to a layer without experts.
            self.front.leave(span)
        else:
            super().come_back(span)

    def _to(self, ffn: int) -> None:
        block = self.browser.snapshot.block_around(ffn)
        self.table.show(self.browser, [range(expert, expert + 1) for expert in block], ffn)
        self.paint()

    def title_texts(self) -> tuple[str, str]:
        snapshot, block = self.browser.snapshot, self._block()
        ffn = snapshot.ffns[block[0]]
        stack = f" {ffn.stack}" if snapshot.several_stacks else ""
        left = f"{self.session.file_name} ▸ layer {ffn.layer_index}{stack}   {len(block)} experts × {ffn.n_channels:,} ch"
        return left, f"{self.browser.heading}  experts"

    def action_neighbour(self, step: int) -> None:
        blocks = self.browser.snapshot.blocks
        count = self.table.take_count() or 1
        here = self.browser.snapshot.block_of(self.ffn)
        others = [number for number in range(len(blocks)) if len(blocks[number]) > 1 and (number - here) * step > 0]
        if others:
            block = blocks[sorted(others, reverse=step < 0)[min(count, len(others)) - 1]]
            self._to(block[min(self.table.place, len(block) - 1)])
