"""A list to choose from: metrics, themes, answers to a question."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList
from textual.widgets.option_list import Option

if TYPE_CHECKING:
    from textual.app import ComposeResult

    from tui.session.front import Question


class ChoiceList(OptionList):
    """An option list that also moves with j and k."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "cursor_down", show=False),
        Binding("k", "cursor_up", show=False),
        Binding("g", "first", show=False),
        Binding("G", "last", show=False),
    ]


class ChoiceScreen(ModalScreen[str | None]):
    """Returns the id of the choice, or None if the user closed the list.

    Args:
        question: The list. The cursor starts on its current choice, or else on the first choice.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "dismiss", "close")]

    def __init__(self, question: Question) -> None:
        super().__init__()
        self.question = question

    def compose(self) -> ComposeResult:
        title, choices, current = self.question
        options = [Option(f"{'●' if key == current else ' '} {text}", id=key) for key, text in choices]
        choice = ChoiceList(*options, id="choices", markup=False)
        choice.border_title = Content(title)  # The name of a file in the title may look like markup.
        choice.highlighted = next((place for place, (key, _) in enumerate(choices) if key == current), 0)
        yield choice

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option.id)
