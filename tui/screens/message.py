"""A text in full, such as what a process said before it failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen

from tui.widgets.lines import Lines
from tui.widgets.text import wrapped

if TYPE_CHECKING:
    from textual.app import ComposeResult


class MessageScreen(ModalScreen[None]):
    """Shows a text until a key closes it.

    Args:
        title: What the text is.
        text: The lines.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,enter", "dismiss", "close"),
        Binding("j", "scroll(1)", "down", show=False),
        Binding("k", "scroll(-1)", "up", show=False),
    ]

    def __init__(self, title: str, text: list[str]) -> None:
        super().__init__()
        self._title = title
        self._text = text

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="box") as box:
            box.border_title = Content(self._title)
            yield Lines(id="message")

    def on_mount(self) -> None:
        self._layout()

    def on_resize(self) -> None:
        self._layout()

    def _layout(self) -> None:
        width = max(10, min(self.app.size.width, 120) - 6)
        lines = [line for text in self._text for line in (wrapped(text, width) or [""])]
        message = self.query_one("#message", Lines)
        message.styles.height = len(lines)
        message.show(*([(line, "")] for line in lines))

    def action_scroll(self, lines: int) -> None:
        self.query_one("#box").scroll_relative(y=lines, animate=False)
