"""The processes that torchrun, or another launcher that sets its variables, started for one command."""

from __future__ import annotations

import os


def processes() -> int:
    """Number of processes that torchrun started for this command; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """Number of this process among the `processes`. The first process, 0, speaks and writes for all."""
    return int(os.environ["RANK"]) if processes() > 1 else 0
