"""The channels that a plan never removes: the union of ``--protect``, without the channels of ``--unprotect``."""

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
    """What one selector adds to the protected channels.

    Attributes:
        name: The selector; a file is named without its directory.
        selected: Number of channels that the selector names.
        new: Block index to a mask of the channels that no earlier selector names and that are not unprotected.
    """

    name: str
    selected: int
    new: Mapping[int, np.ndarray]


@dataclass(frozen=True, eq=False)
class ProtectList:
    """Protected channels of every FFN.

    Attributes:
        masks: Block index to a mask of the protected channels, bool of `Block.shape`.
        selections: What each selector of ``--protect`` adds, in order.
        released: Number of channels that ``--unprotect`` took out of protection.
        warnings: What the user should know about the selectors.
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
        """Number of protected channels, over all FFNs."""
        return count(self.masks)


def protect_list(selectors: Sequence[str], atlas: Atlas, unprotect: Sequence[str] = ()) -> ProtectList:
    """The union of ``selectors``, without the channels that ``unprotect`` names.

    Raises:
        UsageError: A selector or a protect file has no meaning for this atlas.
        AtlasError: The atlas lacks a metric that a selector needs.
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
    """Number of channels that ``masks`` mark, over all FFNs."""
    return sum(int(np.count_nonzero(mask)) for mask in masks.values())
