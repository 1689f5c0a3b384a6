"""Marks and their file in a session: marking, undo, writing, reading, and the questions if the file has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chanfmt.base.text import one_line
from tui.session.front import Question
from tui.session.marks import Marks
from tui.session.protect import NO_FILE, read_marks, selected, signature_of, write_marks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np

    from tui.session.front import Host
    from tui.session.load import Signature, Snapshot

    FileContent = tuple[dict[int, np.ndarray], tuple[str, ...], Signature]

DISCARD = "read the file and discard the unsaved marks"


class Marking:
    """The marks of a session.

    Args:
        host: The session.
        path: The protect file.
        marks: FFN to the marks that ``path`` holds, bool (channel,).
        signature: The signature that ``path`` had when the marks were read.

    Attributes:
        marks: The marks now.
        path: The protect file.
    """

    def __init__(self, host: Host, path: Path, marks: Mapping[int, np.ndarray] | None, signature: Signature) -> None:
        self._host = host
        self.path = path
        self.marks = Marks([ffn.n_channels for ffn in self._snapshot.ffns], marks)
        self._signature = signature
        self._writing = False

    @property
    def _snapshot(self) -> Snapshot:
        return self._host.snapshots[0]

    @property
    def _name(self) -> str:
        return one_line(self.path.name)

    def _changed(self, notice: str) -> None:
        self._host.front.show_marks()
        self._host.say(notice)

    # Changes.

    def mark(self, channels: Mapping[int, np.ndarray], sentence: str, *, on: bool) -> None:
        """Mark or unmark channels, and show how many changed.

        Args:
            channels: FFN to channel ids.
            sentence: What the list of changes says.
        """
        changed = self.marks.mark(channels, sentence, on=on)
        self._changed(f"{'marked' if on else 'unmarked'} {changed:,}" if changed else "nothing changed")

    def mark_rule(self, selector: str, *, on: bool, refused: Callable[[str], object]) -> None:
        """Mark or unmark the channels that ``selector`` names, as after ``surgery prune --protect``; or call ``refused``."""
        snapshot = self._snapshot
        self._host.front.start(
            lambda: selected(selector, snapshot),
            lambda channels: self.mark(channels, one_line(selector), on=on),
            refused=refused,
            group="select",
        )

    def undo(self) -> None:
        """Undo the last change."""
        change = self.marks.undo()
        self._changed(f"undone: {change.sentence}" if change else "nothing to undo")

    def redo(self) -> None:
        """Redo the change that was undone last."""
        change = self.marks.redo()
        self._changed(f"redone: {change.sentence}" if change else "nothing to redo")

    def discard(self) -> None:
        """Go back to the marks on disk, by one change that removes marks and one that adds marks."""
        for on, channels in zip((False, True), self.marks.differences(), strict=True):
            if channels:
                self.marks.mark(channels, "back to the file", on=on)
        self._changed("back to the file")

    def move(self, before: Snapshot, after: Snapshot) -> None:
        """Keep the marks of every FFN of ``before`` that ``after`` also has."""
        old, new = ([ffn.identity for ffn in each.ffns] for each in (before, after))
        self.marks = self.marks.moved(old, new, [ffn.n_channels for ffn in after.ffns])

    # Writing.

    def write(self, then: Callable[[], object] | None = None) -> None:
        """Write the protect file, then call ``then``; ask first if another program has changed the file."""
        if self._writing:
            self._host.say("still writing")
            return
        if signature_of(self.path) == self._signature:
            self._begin_to_write(then)
            return
        write = "write over it" if then is None else "write over it and quit"
        choices = [("stay", "leave it"), ("load", DISCARD), ("write", write)]
        question = Question(f"{self._name} has changed on disk", choices)
        self._host.front.ask(question, lambda choice: self._resolve(choice, then))

    def _resolve(self, choice: str | None, then: Callable[[], object] | None) -> None:
        if choice == "write":
            self._begin_to_write(then)
        elif choice == "load":
            self._load()

    def _begin_to_write(self, then: Callable[[], object] | None) -> None:
        self._writing = True
        snapshot, marks, masks = self._snapshot, self.marks, self.marks.masks
        self._host.front.start(
            lambda: write_marks(self.path, snapshot, masks),
            lambda signature: self._written(marks, masks, signature, then),
            refused=self._not_written,
            group="write",
            exclusive=False,
        )

    def _not_written(self, reason: str) -> None:
        self._writing = False
        self._host.say(reason)

    def _written(
        self, marks: Marks, masks: dict[int, np.ndarray], signature: Signature, then: Callable[[], object] | None
    ) -> None:
        self._writing = False
        self._signature = signature
        # While the file was written, channels may have been marked and FFNs may have moved.
        if marks is self.marks:
            marks.saved(masks)
        self._changed(f"wrote {self._name}")
        if then is not None:
            then()

    # Reading.

    def load(self) -> None:
        """Read the protect file; ask first if marks would be lost."""
        if not sum(self.marks.unsaved) or signature_of(self.path) == NO_FILE:
            self._load()
            return
        question = Question("some marks are not saved", [("stay", "stay"), ("load", DISCARD)])
        self._host.front.ask(question, lambda choice: self._load() if choice == "load" else None)

    def _load(self) -> None:
        snapshot = self._snapshot
        self._host.front.start(
            lambda: read_marks(self.path, snapshot),
            lambda content: self._loaded(snapshot, content),
            refused=self._host.say,
            group="load",
        )

    def _loaded(self, snapshot: Snapshot, content: FileContent) -> None:
        masks, warnings, signature = content
        if signature == NO_FILE:
            self._host.say(f"{self._name} does not exist")
            return
        if snapshot.ffns != self._snapshot.ffns:
            self._load()
            return
        self.marks = Marks(self.marks.widths, masks)
        self._signature = signature
        self._changed(one_line(warnings[0]) if warnings else f"read {self._name}")
