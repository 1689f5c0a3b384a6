"""When to read the file again: pure decision, no clock and no file system."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tui.session.load import Signature


class Watcher:
    """Tells from successive file signatures when a change has settled.

    A writer that does not rename may be half way through, so a new signature counts
    only once two looks in a row agree on it.
    """

    def __init__(self, shown: Signature) -> None:
        self._shown = shown
        self._pending: Signature | None = None

    def changed(self, signature: Signature) -> bool:
        """Record one look; True once for each change that settled."""
        if signature == self._shown:
            self._pending = None
            return False
        if signature != self._pending:
            self._pending = signature
            return False
        self._shown = signature
        self._pending = None
        return True
