"""Numbers in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.text import significant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from chanfmt.analysis.resample import Middle


def times(value: float) -> str:
    """A factor or a correlation as text."""
    return significant(value, 3)


def percent(value: float) -> str:
    """A share as text."""
    return "-" if np.isnan(value) else f"{value:.1%}"


def bracketed(found: Middle, show: Callable[[float], str]) -> str:
    """The interval of a median in brackets, to follow the median; empty if there is no interval."""
    return f" (interval {show(found.low)} to {show(found.high)})" if np.isfinite(found.low) else ""


def with_interval(found: Middle, show: Callable[[float], str]) -> str:
    """A median with its interval as text."""
    return f"{show(found.median)}{bracketed(found, show)}"


def listed(items: Iterable[tuple[str, Middle]], show: Callable[[float], str]) -> str:
    """Names with their medians as text, without unknown medians."""
    return ", ".join(f"{name} {show(found.median)}" for name, found in items if found.count)
