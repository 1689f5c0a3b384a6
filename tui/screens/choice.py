"""A list to choose one of: metrics, themes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList
from textual.widgets.option_list import Option

if TYPE_CHECKING:
    from textual.app import ComposeResult


class ChoiceList(OptionList):
    """An option list that also moves with j and k."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "cursor_down", show=False),
        Binding("k", "cursor_up", show=False),
        Binding("g", "first", show=False),
        Binding("G", "last", show=False),
    ]


class ChoiceScreen(ModalScreen[str | None]):
    """Returns the id of the choice, or None.

    Args:
        title: What is chosen.
        choices: Id and text of each.
        current: Id of the one that holds now, marked and under the cursor.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "dismiss", "close")]

    def __init__(self, title: str, choices: list[tuple[str, str]], current: str) -> None:
        super().__init__()
        self.choice_title = title
        self.choices = choices
        self.current = current

    def compose(self) -> ComposeResult:
        options = [Option(f"{'●' if key == self.current else ' '} {text}", id=key) for key, text in self.choices]
        choice = ChoiceList(*options, id="choices", markup=False)
        choice.border_title = Content(self.choice_title)  # A file's name may look like markup.
        choice.highlighted = next((place for place, (key, _) in enumerate(self.choices) if key == self.current), 0)
        yield choice

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option.id)
