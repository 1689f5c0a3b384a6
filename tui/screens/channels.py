"""What the card and the scatter need of the screen below: the channels of one FFN, with a cursor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tui.session.place import Place


class Channels(Protocol):
    """A screen with the channels of one FFN."""

    @property
    def ffn(self) -> int:
        """The FFN."""

    @property
    def channel(self) -> int:
        """The channel under the cursor."""

    @property
    def channel_text(self) -> str:
        """The channel under the cursor, in words."""

    @property
    def place(self) -> Place:
        """The view, as data."""

    def step_channel(self, step: int) -> None:
        """Move the cursor by ``step`` rows."""

    def action_neighbour(self, step: int) -> None:
        """Show the FFN ``step`` places further."""

    def mark_channel(self) -> None:
        """Mark or unmark the channel under the cursor."""
