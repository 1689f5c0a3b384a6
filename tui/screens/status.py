"""What every screen but the lists and the help has: a session, lines that repaint only what changed, and a status line."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, TypeVar

from textual.screen import Screen

from tui.screens.keys import key_rows
from tui.session.place import Opening, Place
from tui.widgets.lines import Lines
from tui.widgets.text import spread

if TYPE_CHECKING:
    from collections.abc import Callable

    from textual import events

    from tui.session.front import Front
    from tui.session.model import Browser
    from tui.session.session import Session

T = TypeVar("T")


class StatusScreen(Screen[None]):
    """A screen with a status line, which also shows notices.

    Args:
        session: What is open.

    Attributes:
        swapped: Whether the other atlas of the session is the first one on this screen.
    """

    SCREEN: ClassVar[str]
    """Name of the screen in `tui.session.registry`."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self._notice = ""

    @property
    def front(self) -> Front:
        return self.session.front

    @property
    def browser(self) -> Browser:
        return self.session.browser

    @property
    def swapped(self) -> bool:
        return False

    # What subclasses define.

    @property
    def ffn(self) -> int:
        """The FFN that the cursor is on or in."""
        raise NotImplementedError

    @property
    def place(self) -> Place:
        """The view, as data."""
        raise NotImplementedError

    def show_browser(self) -> None:
        """Show the session's browser; the cursor stays if it can."""
        raise NotImplementedError

    def show_marks(self) -> None:
        """Show the session's marks."""
        raise NotImplementedError

    def paint(self) -> None:
        """Bring every line up to date; a line that did not change is not painted."""
        raise NotImplementedError

    def status_text(self) -> str:
        """What is under the cursor."""
        raise NotImplementedError

    # What subclasses may define.

    def show_comparison(self) -> None:
        """Show the comparison as it is now."""

    def come_back(self, span: range) -> None:
        """Put the cursor on the FFNs ``span``, which the screen above has shown until now."""

    def comments(self) -> tuple[str, ...]:
        """Command lines that the key D prints beside the command that opens the view."""
        return ()

    # Navigation and work.

    def open(self, name: str, *, ffn: int | None = None, filter: str = "") -> None:
        """Put the screen ``name`` on top of this screen."""
        ffn = self.ffn if ffn is None else ffn
        self.front.open(name, Opening(ffn, Place(name, filter=filter), self))

    def start(
        self,
        work: Callable[[], T],
        then: Callable[[T], object],
        *,
        refused: Callable[[str], object],
        group: str,
    ) -> None:
        """Run ``work`` in a thread, then ``then`` or ``refused``, as `Front.start` does; neither if the screen has closed."""
        self.front.start(work, self._if_open(then), refused=self._if_open(refused), group=group)

    def _if_open(self, action: Callable[[T], object]) -> Callable[[T], None]:
        def run(value: T) -> None:
            if self.is_running and self.is_attached:
                action(value)

        return run

    def key(self, action: str) -> str:
        """The key of ``action``, which is written as in a binding of this screen."""
        return next((row.keys[0] for row in key_rows(self) if row.action == action), action)

    def action_undo(self) -> None:
        self.session.marking.undo()

    # Painting.

    def say(self, notice: str) -> None:
        """Show ``notice`` in the status line until the next key."""
        self._notice = notice
        # A screen that is opening paints by itself, and a screen that is closing has lost its lines.
        if self.query("#status"):
            self.paint_status()

    def paint_status(self) -> None:
        """Bring the status line up to date."""
        text = spread(f" {self.status_text()}", f"{self.status_end()} ", self.app.size.width)
        self.lines("status").show([(text, "")])

    def status_end(self) -> str:
        """The text at the right end of the status line."""
        unsaved = sum(self.session.marks.unsaved)
        state = [self.session.measuring.progress, f"{unsaved:,} unsaved" if unsaved else ""]
        return self._notice or "  ".join(filter(None, state))

    def lines(self, identity: str) -> Lines:
        """The widget with the id ``identity``."""
        return self.query_one(f"#{identity}", Lines)

    def on_resize(self) -> None:
        # The children know their new sizes only after the refresh.
        self.call_after_refresh(self.paint)

    def on_screen_resume(self) -> None:
        self.call_after_refresh(self.paint)

    def on_key(self, event: events.Key) -> None:
        if self._notice:
            self.say("")
