"""What every screen but the dialogs has: lines that are painted where they changed, one of them for notices."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from textual.screen import Screen

from tui.widgets.lines import Lines
from tui.widgets.text import spread

if TYPE_CHECKING:
    from textual import events

    from tui.app import AtlasApp


class StatusScreen(Screen[None]):
    """A screen with a status line, which also says what has happened."""

    def __init__(self) -> None:
        super().__init__()
        self._notice = ""

    @property
    def atlas_app(self) -> AtlasApp:
        return cast("AtlasApp", self.app)

    # What subclasses say.

    def show_browser(self) -> None:
        """Show the app's new browser, keeping the cursor where it can stay."""
        raise NotImplementedError

    def show_marks(self) -> None:
        """Show that other channels are marked."""
        raise NotImplementedError

    def paint(self) -> None:
        """Bring every line up to date; those that did not change are not painted."""
        raise NotImplementedError

    def status_text(self) -> str:
        """What is under the cursor."""
        raise NotImplementedError

    # Painting.

    def say(self, notice: str) -> None:
        """Show ``notice`` in the status line until the next key."""
        self._notice = notice
        # A screen that is just opening paints by itself, and one that closes has lost its lines.
        if self.query("#status"):
            self.paint_status()

    def paint_status(self) -> None:
        text = spread(f" {self.status_text()}", f"{self.status_end()} ", self.app.size.width)
        self.lines("status").show([(text, "")])

    def status_end(self) -> str:
        """What stands at the right of the status."""
        unsaved = sum(self.atlas_app.marks.unsaved)
        return self._notice or (f"{unsaved:,} unsaved" if unsaved else "")

    def lines(self, identity: str) -> Lines:
        """The widget ``identity``."""
        return self.query_one(f"#{identity}", Lines)

    def on_resize(self) -> None:
        # After the children know their new sizes.
        self.call_after_refresh(self.paint)

    def on_screen_resume(self) -> None:
        self.call_after_refresh(self.paint)

    def on_key(self, event: events.Key) -> None:
        if self._notice:
            self.say("")
