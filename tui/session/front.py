"""What a session and the screens ask of the program that shows them. `tui.app.AtlasApp` answers; a test may, too."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from textual.widget import Widget

    from tui.session.load import Snapshot
    from tui.session.place import Opening

T = TypeVar("T")


class Question(NamedTuple):
    """A list to choose from.

    Attributes:
        title: What is chosen.
        choices: Id and text of each choice.
        current: Id of the choice that holds now, which is marked; empty if no choice holds.
    """

    title: str
    choices: list[tuple[str, str]]
    current: str = ""


class Front(Protocol):
    """The program around a session."""

    @property
    def ramp(self) -> tuple[str, ...]:
        """Colours of the heat strips, low to high; empty if the strips are drawn in glyphs."""

    @property
    def colourless(self) -> bool:
        """Whether the user asked for no colour."""

    @property
    def picture_widget(self) -> Callable[[bytes], Widget] | None:
        """What makes a widget of a PNG; None if the terminal shows text only."""

    def start(
        self,
        work: Callable[[], T],
        then: Callable[[T], object],
        *,
        refused: Callable[[str], object],
        group: str,
        exclusive: bool = True,
    ) -> None:
        """Run ``work`` in a thread, then ``then`` with its result on the event loop.

        Args:
            refused: Called on the event loop with the message of a `ChanfmtError` that ``work`` raised.
            group: Name of the kind of work.
            exclusive: Whether this work replaces earlier work of the ``group``.
        """

    def say(self, notice: str) -> None:
        """Show ``notice`` in the status line of the top screen until the next key."""

    def ask(self, question: Question, answer: Callable[[str | None], None]) -> None:
        """Let the user choose; ``answer`` gets the id of the choice, or None if the user closed the list."""

    def show_browser(self) -> None:
        """Make every open screen show the session's browser."""

    def show_marks(self) -> None:
        """Make every open screen show the session's marks."""

    def show_comparison(self) -> None:
        """Make every open screen show the comparison as it is now."""

    def show_progress(self) -> None:
        """Show how far the session's measurement is."""

    def show_text(self, title: str, lines: list[str]) -> None:
        """Show ``lines`` in full until the user closes them."""

    def copy(self, text: str) -> None:
        """Put ``text`` on the clipboard."""

    def open(self, name: str, opening: Opening) -> None:
        """Put the screen ``name`` on top."""

    def visit(self, name: str) -> None:
        """Go to the screen ``name``, which has a key: back to it if it is open, or else open it."""

    def leave(self, span: range) -> None:
        """Close the top screen, and put the cursor of the screen below on the FFNs ``span``."""

    def exit(self, result: str | None = None) -> None:
        """End the program; it prints ``result``."""


class Host(Protocol):
    """A session, as far as its parts see it."""

    @property
    def front(self) -> Front: ...

    @property
    def snapshots(self) -> list[Snapshot]:
        """The atlas, and the atlas to compare with if there is one."""

    def say(self, notice: str) -> None:
        """Show ``notice`` in the status line."""
