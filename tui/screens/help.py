"""The keys of the screen below, in two columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen

from tui.screens.keys import KeyRow, help_lines
from tui.widgets.lines import Lines

if TYPE_CHECKING:
    from textual.app import ComposeResult


class HelpScreen(ModalScreen[None]):
    """Shows the keys of a screen.

    Args:
        rows: The keys, as `tui.screens.keys.key_rows` reads them from the bindings.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark", "dismiss", "close"),
        Binding("j", "scroll(1)", "down", show=False),
        Binding("k", "scroll(-1)", "up", show=False),
    ]

    def __init__(self, rows: list[KeyRow]) -> None:
        super().__init__()
        self.rows = rows

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="box"):
            yield Lines(id="help")

    def on_mount(self) -> None:
        self._layout(self.app.size.width)

    def on_resize(self) -> None:
        self._layout(self.app.size.width)

    def _layout(self, width: int) -> None:
        lines = help_lines(self.rows, max(10, min(width, 120) - 6))
        help_text = self.query_one("#help", Lines)
        help_text.styles.height = len(lines)
        help_text.show(*lines)

    def action_scroll(self, lines: int) -> None:
        self.query_one("#box").scroll_relative(y=lines, animate=False)
