"""Parameters that `make test` leaves out."""

from __future__ import annotations

from typing import Any

import pytest


def repeated(*values: Any) -> list[Any]:
    """Each of ``values``, or the parameters in a tuple, for `make test-repeated` alone: a parameter beside it runs the same code."""
    return [pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.repeated) for value in values]
