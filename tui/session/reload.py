"""Reading the files of a session again: on request, or when a change has settled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chanfmt.base.errors import AtlasError
from chanfmt.base.text import one_line
from tui.session.load import Snapshot, file_signature, present_file, read_snapshot
from tui.session.watch import Watcher

if TYPE_CHECKING:
    from collections.abc import Callable

    from tui.session.front import Host


class Reloader:
    """Watches the files of a session and reads them again.

    Args:
        host: The session.
        accept: Called with the atlas and the list of other atlases as read, if any of them could be read. An atlas that
            could not be read is given as it was.
    """

    def __init__(self, host: Host, accept: Callable[[Snapshot, list[Snapshot]], None]) -> None:
        self._host = host
        self._accept = accept
        self._watchers = [Watcher(snapshot.signature) for snapshot in host.snapshots]
        # A result with an older generation has been overtaken and is dropped.
        self._generation = 0

    def watch_other(self, other: Snapshot) -> None:
        """Watch ``other`` as the atlas to compare with."""
        self._watchers = [self._watchers[0], Watcher(other.signature)]
        self._generation += 1

    def watch_first(self, snapshot: Snapshot) -> None:
        """Watch ``snapshot``, which has been read and accepted already, as the atlas that is shown."""
        self._watchers[0] = Watcher(snapshot.signature)
        self._generation += 1

    def poll(self) -> None:
        """Look at the files once, and read them again if a change has settled."""
        changed = False
        for snapshot, watcher in zip(self._host.snapshots, self._watchers, strict=True):
            try:
                changed |= watcher.changed(file_signature(present_file(snapshot.path)))
            except OSError as error:
                self._keep(snapshot, str(error.strerror))
        if changed:
            self.reload()

    def reload(self) -> None:
        """Read the files again now."""
        self._generation += 1
        generation, shown = self._generation, self._host.snapshots
        self._host.front.start(
            lambda: [_read_again(snapshot, contained=place > 0) for place, snapshot in enumerate(shown)],
            lambda read: self._have(generation, shown, read),
            refused=self._host.say,
            group="reload",
        )

    def _have(self, generation: int, shown: list[Snapshot], read: list[Snapshot | str]) -> None:
        if generation != self._generation:
            return
        if any(isinstance(new, Snapshot) for new in read):
            snapshot, *others = [old if isinstance(new, str) else new for old, new in zip(shown, read, strict=True)]
            self._accept(snapshot, others)
        for place, found in enumerate(read):
            if isinstance(found, str):
                self._keep(shown[place], found)
            else:
                self._watchers[place] = Watcher(found.signature)

    def _keep(self, snapshot: Snapshot, reason: str) -> None:
        brief = reason.replace(str(snapshot.path), snapshot.path.name)
        self._host.say(f"still shown as read at {snapshot.read_at:%H:%M:%S}: {one_line(brief)}")


def _read_again(snapshot: Snapshot, *, contained: bool) -> Snapshot | str:
    """The file of ``snapshot`` as it is now, or why it could not be read."""
    try:
        return read_snapshot(snapshot.path, contained=contained)
    except AtlasError as error:
        return error.message
