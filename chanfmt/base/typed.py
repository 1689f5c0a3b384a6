"""What was read from JSON, by the type that it has to have."""

from __future__ import annotations

import math
from typing import Any


def typed(value: Any, kind: Any, name: str) -> Any:
    """``value``, which has to be of the type ``kind``, and finite. Raises ValueError, which calls it ``name``."""
    # True is an int to Python.
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
        raise ValueError(f"{name} is not valid")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is not a number")
    return value


def list_of(value: Any, kind: type, name: str) -> tuple[Any, ...]:
    """``value``, which has to be a list of such. Raises ValueError."""
    return tuple(typed(item, kind, name) for item in typed(value, list, name))
