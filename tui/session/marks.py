"""Channels marked for protection, with undo. Pure numpy; the file is written elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence


@dataclass(frozen=True, eq=False)
class Change:
    """One operation: ``channels`` (FFN to ascending ids) became marked, or ceased to be."""

    sentence: str
    channels: Mapping[int, np.ndarray]
    on: bool

    @property
    def count(self) -> int:
        """Channels that changed."""
        return sum(map(len, self.channels.values()))


class Marks:
    """Marks of every FFN.

    Args:
        widths: Channels of every FFN, in the order of `tui.session.load.Snapshot.ffns`.
        masks: Marks that are on disk, FFN to bool (channel,).
    """

    def __init__(self, widths: Sequence[int], masks: Mapping[int, np.ndarray] | None = None) -> None:
        self.widths = tuple(widths)
        # One array: pages of it that nothing is marked in take no memory.
        ends = np.cumsum((0, *self.widths))
        self._masks = np.split(np.zeros(ends[-1], dtype=bool), ends[1:-1])
        for ffn, mask in (masks or {}).items():
            self._masks[ffn] |= mask
        self._counts: list[int] | None = None
        self._unsaved: tuple[int, int] | None = None
        self.done: list[Change] = []
        self._undone: list[Change] = []
        # A mask is copied once it changes.
        self._on_disk = list(self._masks)

    def of(self, ffn: int) -> np.ndarray:
        """Marks of FFN ``ffn``, bool (channel,); not to be written to."""
        return self._masks[ffn]

    @property
    def counts(self) -> list[int]:
        """Marked channels of every FFN."""
        # Asked at every key, and an atlas may have thousands of experts.
        if self._counts is None:
            self._counts = [int(np.count_nonzero(mask)) for mask in self._masks]
        return self._counts

    @property
    def masks(self) -> dict[int, np.ndarray]:
        """A copy of all marks, FFN to bool (channel,)."""
        return {ffn: mask.copy() for ffn, mask in enumerate(self._masks)}

    @property
    def unsaved(self) -> tuple[int, int]:
        """Channels that are marked and not on disk, and the other way round."""
        if self._unsaved is None:
            added, removed = self.differences()
            self._unsaved = sum(map(len, added.values())), sum(map(len, removed.values()))
        return self._unsaved

    def differences(self) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """FFN to the ids that are marked and not on disk, and the other way round."""
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
        """The marks of the FFNs named ``old`` where they are called the same in ``new`` and as wide; no changes to undo."""
        places = {name: ffn for ffn, name in enumerate(old)}
        kept = {ffn: places[name] for ffn, name in enumerate(new) if name in places and self.widths[places[name]] == widths[ffn]}
        marks = Marks(widths, {ffn: self._on_disk[place] for ffn, place in kept.items()})
        for ffn, place in kept.items():
            marks._masks[ffn] = self._masks[place].copy()
        marks._changed()
        return marks

    def saved(self, masks: Mapping[int, np.ndarray]) -> None:
        """Say that ``masks``, of every FFN, are on disk."""
        self._on_disk = [now if np.array_equal(now, masks[ffn]) else masks[ffn] for ffn, now in enumerate(self._masks)]
        self._changed()

    def _changed(self) -> None:
        self._counts, self._unsaved = None, None

    def mark(self, channels: Mapping[int, np.ndarray], sentence: str, *, on: bool) -> int:
        """Mark, or unmark, FFN to channel ids. Returns how many changed."""
        changed = {ffn: ids[self._masks[ffn][ids] != on] for ffn, ids in channels.items()}
        change = Change(sentence, {ffn: ids for ffn, ids in changed.items() if len(ids)}, on)
        if change.count:
            self._put(change, on=on)
            self.done.append(change)
            self._undone.clear()
        return change.count

    def undo(self) -> Change | None:
        """Take the last change back and return it; None where there is none."""
        if not self.done:
            return None
        change = self.done.pop()
        self._put(change, on=not change.on)
        self._undone.append(change)
        return change

    def redo(self) -> Change | None:
        """Make the change that was taken back last again; None where there is none."""
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
