"""Which channels a plan may never remove: the union of ``--protect``, less what ``--unprotect`` names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from surgery.planning.protect_file import no_channels
from surgery.planning.selectors import file_name, select

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chanfmt.format.reader import Atlas
    from chanfmt.format.records import Block


@dataclass(frozen=True, eq=False)
class Selection:
    """What one selector adds.

    Attributes:
        name: The selector, files without their directory.
        selected: Channels it names.
        new: Block index to a mask of the channels that no earlier selector names, less what is unprotected.
    """

    name: str
    selected: int
    new: Mapping[int, np.ndarray]


@dataclass(frozen=True, eq=False)
class ProtectList:
    """Protected channels of every FFN.

    Attributes:
        masks: Block index to a mask of its protected channels, bool of `Block.shape`.
        selections: What each ``--protect`` adds, in order.
        released: Channels that would be protected but for ``--unprotect``.
        warnings: What the user should know about where they came from.
    """

    masks: Mapping[int, np.ndarray]
    selections: tuple[Selection, ...] = ()
    released: int = 0
    warnings: tuple[str, ...] = ()

    def of(self, block: Block) -> np.ndarray:
        """Mask of ``block``'s protected channels, bool of `Block.shape`."""
        return self.masks[block.index]

    @property
    def count(self) -> int:
        """Protected channels in all FFNs."""
        return count(self.masks)


def protect_list(selectors: Sequence[str], atlas: Atlas, unprotect: Sequence[str] = ()) -> ProtectList:
    """The union of ``selectors``, less what ``unprotect`` names.

    Raises:
        UsageError: A selector or a protect file cannot mean anything for this atlas.
        AtlasError: The atlas lacks a metric that one needs.
    """
    warnings: list[str] = []
    freed = no_channels(atlas)
    for selector in unprotect:
        masks, notes = select(selector, atlas)
        warnings += notes
        freed = {index: freed[index] | mask for index, mask in masks.items()}
    union, released = no_channels(atlas), no_channels(atlas)
    selections = []
    for selector in selectors:
        masks, notes = select(selector, atlas)
        warnings += notes
        new = {index: mask & ~freed[index] & ~union[index] for index, mask in masks.items()}
        released = {index: released[index] | (mask & freed[index]) for index, mask in masks.items()}
        union = {index: union[index] | mask for index, mask in new.items()}
        selections.append(Selection(file_name(selector), count(masks), new))
    return ProtectList(union, tuple(selections), count(released), tuple(warnings))


def count(masks: Mapping[int, np.ndarray]) -> int:
    """Channels that ``masks`` mark, in all FFNs."""
    return sum(int(np.count_nonzero(mask)) for mask in masks.values())
