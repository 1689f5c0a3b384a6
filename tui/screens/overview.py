"""The first screen: every block of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding, BindingType

from tui.screens.base import METRIC_BINDINGS, common_bindings
from tui.screens.layers import LayerTableScreen
from tui.widgets.layer_table import LayerTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tui.session.place import Opening
    from tui.session.session import Session


class OverviewScreen(LayerTableScreen):
    """The blocks of the model."""

    SCREEN = "overview"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "layer", tooltip="open the layer (5{key}: row 5)", id="open"),
        *METRIC_BINDINGS,
        *common_bindings("overview"),
        Binding("q", "quit", "quit", show=False, tooltip="quit", id="quit"),
        Binding("escape", "escape", "close", show=False, tooltip="close or clear"),
    ]

    def __init__(self, session: Session, opening: Opening) -> None:
        table = LayerTable(session.browser, session.browser.snapshot.blocks, session.front.ramp)
        super().__init__(session, table, opening.ffn)

    def spans(self) -> Sequence[range]:
        return self.browser.snapshot.blocks

    def title_texts(self) -> tuple[str, str]:
        snapshot = self.browser.snapshot
        rows = "FFNs" if snapshot.several_stacks else "layers"
        experts = _extent([len(block) for block in snapshot.blocks]) + " experts × " if snapshot.has_experts else ""
        size = f"{len(snapshot.blocks)} {rows} × {experts}{_extent([ffn.n_channels for ffn in snapshot.ffns])} ch"
        partial = "" if snapshot.status == "complete" else f"{snapshot.status.upper()}: "
        left = f"{self.session.file_name}   {partial}{snapshot.model_id}   {size}   {snapshot.calibration_tokens:,} tokens"
        return left, f"{self.browser.heading}  overview"

    def action_quit(self) -> None:
        self.session.quit()


def _extent(numbers: Sequence[int]) -> str:
    """The smallest and the largest of ``numbers``, in words."""
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"
