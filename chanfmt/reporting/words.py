"""Numbers in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.text import significant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from chanfmt.analysis.resample import Middle


def times(value: float) -> str:
    """A factor, or a correlation."""
    return significant(value, 3)


def percent(value: float) -> str:
    """A share."""
    return "-" if np.isnan(value) else f"{value:.1%}"


def bracketed(found: Middle, show: Callable[[float], str]) -> str:
    """A median's interval in brackets, to follow it; nothing where there is none."""
    return f" (interval {show(found.low)} to {show(found.high)})" if np.isfinite(found.low) else ""


def with_interval(found: Middle, show: Callable[[float], str]) -> str:
    """A median with its interval."""
    return f"{show(found.median)}{bracketed(found, show)}"


def listed(items: Iterable[tuple[str, Middle]], show: Callable[[float], str]) -> str:
    """Names with their medians, those left out that are not known."""
    return ", ".join(f"{name} {show(found.median)}" for name, found in items if found.count)
