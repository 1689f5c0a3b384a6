"""What a report is made of. Data only: `chanfmt.reporting.pages` writes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from chanfmt.analysis.resample import Middle


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of equal length, written to ``data/NAME.csv``."""

    name: str
    columns: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Plot:
    """A figure.

    Attributes:
        name: Of the files ``figures/NAME.png`` and ``.svg``.
        caption: What it shows, in sentences.
        data: Names of the tables that it is drawn from.
        draw: One function per panel, from left to right; each draws into the matplotlib axes it is given.
        size: Width and height in inches.
        claims: Those of the section that it shows.
        legend_below: Whether one legend below the panels names the lines of all of them.
    """

    name: str
    caption: str
    data: tuple[str, ...]
    draw: tuple[Callable[[Any], None], ...]
    size: tuple[float, float] = (7.0, 3.2)
    claims: tuple[Claim, ...] = ()
    legend_below: bool = False


AGREES, DIFFERS, UNDECIDED, NOT_COMPARABLE = "agrees", "differs", "undecided", "not comparable"


@dataclass(frozen=True)
class Claim:
    """A statement of the paper beside the same number of this atlas.

    Attributes:
        statement: What is claimed.
        paper: The paper's number, with the model.
        measured: This atlas's number.
        verdict: Whether this atlas shows the same: ``AGREES``, ``DIFFERS``, ``UNDECIDED`` where the interval of its number
            holds both, ``NOT_COMPARABLE`` where there is no such number or interval.
        criterion: When it agrees.
    """

    statement: str
    paper: str
    measured: str
    verdict: str
    criterion: str


def above(found: Middle, limit: float) -> str:
    """Verdict on a median being above ``limit``, by its interval."""
    if not (np.isfinite(found.low) and np.isfinite(found.high)):
        return NOT_COMPARABLE
    return AGREES if found.low > limit else DIFFERS if found.high < limit else UNDECIDED


def below(found: Middle, limit: float) -> str:
    """Verdict on a median being below ``limit``, by its interval."""
    return {AGREES: DIFFERS, DIFFERS: AGREES}.get(verdict := above(found, limit), verdict)


def worst(verdicts: Iterable[str]) -> str:
    """Verdict on all of several: what speaks most against it."""
    return max(verdicts, key=(AGREES, UNDECIDED, NOT_COMPARABLE, DIFFERS).index, default=NOT_COMPARABLE)


@dataclass(frozen=True, eq=False)
class Section:
    """One question.

    Attributes:
        title: The question's subject.
        text: Paragraphs.
        numbers: Name to value, for ``report.json`` and the section's table.
        missing: What of it the atlas cannot say, and what would; empty where nothing is missing.
    """

    key: str
    title: str
    text: tuple[str, ...] = ()
    numbers: Mapping[str, float | int] = field(default_factory=dict)
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    claims: tuple[Claim, ...] = ()
    missing: tuple[str, ...] = ()
