"""Columns that the rows of all experiments have: what was removed, and what the loss was."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.evaluation.perplexity import BlockLosses

if TYPE_CHECKING:
    from collections.abc import Mapping

LOSS_COLUMNS = ("perplexity", "nll", "standard_error", "tokens", "seconds", "block_nll", "block_predicted")


def channels_sha256(removed: Mapping[int, np.ndarray], means: Mapping[int, np.ndarray] | None = None, refit: str = "") -> str:
    """SHA-256 of the channels that are removed, the values that replace them, and the name of the refit of the others.

    Args:
        removed: Block index to a mask, bool (channel,) or (expert, channel).
        means: Block index to the values, of the shape of the masks; None for 0.
        refit: Name of the recovery; empty without one.
    """
    digest = hashlib.sha256(refit.encode())
    for index in sorted(removed):
        if removed[index].any():
            digest.update(f"{index}{removed[index].shape}".encode() + np.packbits(removed[index]).tobytes())
            if means is not None:
                digest.update(np.where(removed[index], means[index], 0.0).astype("<f8").tobytes())
    return digest.hexdigest()


def loss_columns(losses: BlockLosses, seconds: float) -> dict[str, Any]:
    """`LOSS_COLUMNS` of a row; numbers that are not finite become None."""
    values = (
        finite(losses.perplexity),
        losses.mean,
        finite(losses.standard_error),
        int(losses.predicted.sum()),
        round(seconds, 3),
        losses.nll.tolist(),
        losses.predicted.tolist(),
    )
    return dict(zip(LOSS_COLUMNS, values, strict=True))


def losses_of(row: Mapping[str, Any]) -> BlockLosses:
    """The losses that `loss_columns` put into ``row``."""
    return BlockLosses(np.array(row["block_nll"], dtype=np.float64), np.array(row["block_predicted"], dtype=np.int64))


def finite(value: float) -> float | None:
    """``value``; None if it is not finite, because JSON has no such number."""
    return value if math.isfinite(value) else None
