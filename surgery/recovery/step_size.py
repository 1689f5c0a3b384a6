"""The size of the steps of a gradient descent, over its length."""

from __future__ import annotations

import math


def step_share(step: int, steps: int, warmup: int) -> float:
    """The size of step number ``step``, from 0 on, as a share of the largest: it rises for ``warmup`` steps, and falls along a
    cosine over all ``steps``."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
