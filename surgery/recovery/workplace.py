"""Where a refit works, as data: what it writes to, whom it tells, and what it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from surgery.recovery.resume import PartialRefit


@dataclass(frozen=True, eq=False)
class Workplace:
    """Where a refit works.

    Attributes:
        directory: Directory for hidden states and fitted weights that exceed the memory limit.
        begin: Called with the total of the numbers that ``progress`` will be called with: at the beginning of a refit, and
            again at that of a distillation.
        progress: Called with the number of sequences that just passed through a block, or that a step took.
        dtype: Dtype of the floating tensors of the result; None if they stay as they are stored.
        partial_refit: Where a refit is saved between blocks, and what an interrupted one left there; None to save nothing.
        reserved: Bytes that will be written to the file system of ``directory`` besides.
    """

    directory: Path
    begin: Callable[[int], object] = lambda total: None
    progress: Callable[[int], object] = lambda sequences: None
    dtype: str | None = None
    partial_refit: PartialRefit | None = None
    reserved: int = 0
