"""Channels marked for protection, with undo. Pure numpy; `tui.session.protect` writes the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence


@dataclass(frozen=True, eq=False)
class Change:
    """One operation: ``channels`` (FFN to ascending ids) were marked if ``on``, or else unmarked."""

    sentence: str
    channels: Mapping[int, np.ndarray]
    on: bool

    @property
    def count(self) -> int:
        """Number of channels that changed."""
        return sum(map(len, self.channels.values()))


class Marks:
    """Marks of every FFN, and the changes that led to them.

    Args:
        widths: Number of channels of every FFN, in the order of `tui.session.load.Snapshot.ffns`.
        masks: Marks that are on disk, FFN to bool (channel,).

    Attributes:
        done: The changes that can be undone, oldest first.
    """

    def __init__(self, widths: Sequence[int], masks: Mapping[int, np.ndarray] | None = None) -> None:
        self.widths = tuple(widths)
        # One array for all FFNs: its pages without a mark take no memory.
        ends = np.cumsum((0, *self.widths))
        self._masks = np.split(np.zeros(ends[-1], dtype=bool), ends[1:-1])
        for ffn, mask in (masks or {}).items():
            self._masks[ffn] |= mask
        self._counts: list[int] | None = None
        self._unsaved: tuple[int, int] | None = None
        self.done: list[Change] = []
        self._undone: list[Change] = []
        # `_put` copies a mask before its first change.
        self._on_disk = list(self._masks)

    def of(self, ffn: int) -> np.ndarray:
        """Marks of FFN ``ffn``, bool (channel,). Do not write to the array."""
        return self._masks[ffn]

    @property
    def counts(self) -> list[int]:
        """Number of marked channels of every FFN."""
        # Every key asks for the counts, and an atlas may have thousands of experts.
        if self._counts is None:
            self._counts = [int(np.count_nonzero(mask)) for mask in self._masks]
        return self._counts

    @property
    def masks(self) -> dict[int, np.ndarray]:
        """A copy of all marks, FFN to bool (channel,)."""
        return {ffn: mask.copy() for ffn, mask in enumerate(self._masks)}

    @property
    def unsaved(self) -> tuple[int, int]:
        """Number of channels that are marked but not on disk, and number that are on disk but not marked."""
        if self._unsaved is None:
            added, removed = self.differences()
            self._unsaved = sum(map(len, added.values())), sum(map(len, removed.values()))
        return self._unsaved

    def differences(self) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """FFN to the channel ids that are marked but not on disk, and FFN to the ids that are on disk but not marked."""
        pairs = [
            (ffn, now, disk)
            for ffn, (now, disk) in enumerate(zip(self._masks, self._on_disk, strict=True))
            if now is not disk and not np.array_equal(now, disk)
        ]
        return (
            {ffn: np.flatnonzero(now & ~disk) for ffn, now, disk in pairs},
            {ffn: np.flatnonzero(disk & ~now) for ffn, now, disk in pairs},
        )

    def moved(self, old: Sequence[Hashable], new: Sequence[Hashable], widths: Sequence[int]) -> Marks:
        """The marks for an atlas with other FFNs. They start without changes to undo.

        Args:
            old: Name of every FFN so far.
            new: Name of every FFN from now on. An FFN keeps its marks if its name is in ``old`` and its width is the same.
            widths: Number of channels of every FFN from now on.
        """
        places = {name: ffn for ffn, name in enumerate(old)}
        kept = {ffn: places[name] for ffn, name in enumerate(new) if name in places and self.widths[places[name]] == widths[ffn]}
        marks = Marks(widths, {ffn: self._on_disk[place] for ffn, place in kept.items()})
        for ffn, place in kept.items():
            marks._masks[ffn] = self._masks[place].copy()
        marks._changed()
        return marks

    def saved(self, masks: Mapping[int, np.ndarray]) -> None:
        """Record that ``masks``, FFN to bool (channel,) for every FFN, are on disk."""
        self._on_disk = [now if np.array_equal(now, masks[ffn]) else masks[ffn] for ffn, now in enumerate(self._masks)]
        self._changed()

    def _changed(self) -> None:
        self._counts, self._unsaved = None, None

    def mark(self, channels: Mapping[int, np.ndarray], sentence: str, *, on: bool) -> int:
        """Mark or unmark ``channels``, FFN to channel ids; return how many changed."""
        changed = {ffn: ids[self._masks[ffn][ids] != on] for ffn, ids in channels.items()}
        change = Change(sentence, {ffn: ids for ffn, ids in changed.items() if len(ids)}, on)
        if change.count:
            self._put(change, on=on)
            self.done.append(change)
            self._undone.clear()
        return change.count

    def undo(self) -> Change | None:
        """Undo the last change and return it; return None if there is none."""
        if not self.done:
            return None
        change = self.done.pop()
        self._put(change, on=not change.on)
        self._undone.append(change)
        return change

    def redo(self) -> Change | None:
        """Redo the change that was undone last and return it; return None if there is none."""
        if not self._undone:
            return None
        change = self._undone.pop()
        self._put(change, on=change.on)
        self.done.append(change)
        return change

    def _put(self, change: Change, *, on: bool) -> None:
        for ffn, ids in change.channels.items():
            if self._on_disk[ffn] is self._masks[ffn]:
                self._on_disk[ffn] = self._masks[ffn].copy()
            self._masks[ffn][ids] = on
        self._changed()
