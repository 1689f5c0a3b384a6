"""How a cut is written: the options of `surgery.cut.prune`, `surgery.cut.apply` and `surgery.cut.restore`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CutOptions:
    """How a cut is written and checked.

    Attributes:
        overwrite: Whether an earlier result in the output directory is replaced.
        verify: Whether logits are compared with those of the masked dense model. Shapes are always checked.
        fine_tune: Whether the model is a fine-tune of the plan's model: other weights in the same tensors.
        shard_bytes: Largest size of a weights file in bytes; None for files that correspond to the model's.
        allow_padding: Whether the cut is made although the file shrinks by less than half of what was asked, because zero
            channels take the place of removed ones.
    """

    overwrite: bool = False
    verify: bool = True
    fine_tune: bool = False
    shard_bytes: int | None = None
    allow_padding: bool = False


CUT_DEFAULTS = CutOptions()
"""The options of a cut unless others are given."""
