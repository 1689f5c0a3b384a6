"""What a report is made of. Data only: `chanfmt.report.pages` writes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np


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
        draw: Draws into a new matplotlib figure.
        size: Width and height in inches.
    """

    name: str
    caption: str
    data: tuple[str, ...]
    draw: Callable[[Any], None]
    size: tuple[float, float] = (7.0, 3.2)


@dataclass(frozen=True)
class Claim:
    """A statement of the paper beside the same number of this atlas.

    Attributes:
        statement: What is claimed.
        paper: The paper's number, with the model.
        measured: This atlas's number.
        agrees: Whether this atlas shows the same; None where that cannot be said.
        criterion: What ``agrees`` means.
    """

    statement: str
    paper: str
    measured: str
    agrees: bool | None
    criterion: str

    @property
    def verdict(self) -> str:
        return "not comparable" if self.agrees is None else "agrees" if self.agrees else "differs"


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
