"""When to read a file again. A pure decision: it uses neither clock nor file system."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tui.session.load import Signature


class Watcher:
    """Decides from successive file signatures when a change has settled.

    A program that writes in place may be half way through. A new signature therefore counts only when two looks in a row
    agree on it.

    Args:
        shown: The signature of the file as it is shown.
    """

    def __init__(self, shown: Signature) -> None:
        self._shown = shown
        self._pending: Signature | None = None

    def changed(self, signature: Signature) -> bool:
        """Record one look; return True once for each change that has settled."""
        if signature == self._shown:
            self._pending = None
            return False
        if signature != self._pending:
            self._pending = signature
            return False
        self._shown = signature
        self._pending = None
        return True
