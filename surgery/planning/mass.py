"""Share of the loss proxy LP that channels hold. Pure numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from chanfmt.format.reader import Stack
    from chanfmt.format.records import Block


def lp_mass(stack: Stack, block: Block) -> np.ndarray:
    """LP of each channel times its tokens, nats^2, float64 of `Block.shape`. It can be summed over FFNs and experts.

    Channels that no token reached have mass 0.
    """
    lp = np.asarray(stack.row("lp", block.row), dtype=np.float64)
    tokens = np.asarray(stack.row("tokens", block.row), dtype=np.float64)[..., None]
    return np.where(tokens > 0, lp * tokens, 0.0)
