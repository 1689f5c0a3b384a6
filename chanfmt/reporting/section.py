"""The parts of a report, as data; `chanfmt.reporting.pages` writes them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from chanfmt.analysis.resample import Middle


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """Columns of equal length, written to ``data/NAME.csv``."""

    name: str
    columns: Mapping[str, np.ndarray]

    def __repr__(self) -> str:
        return f"<Table {self.name!r}: {', '.join(self.columns)}>"


@dataclass(frozen=True, eq=False, repr=False)
class Plot:
    """A figure.

    Attributes:
        name: Name of the files ``figures/NAME.png`` and ``.svg``.
        caption: Description in sentences.
        data: Names of the tables that hold the drawn numbers.
        draw: One function per panel, from left to right; each draws into the matplotlib axes it is given.
        size: Width and height in inches.
        claims: Claims of the section that the figure shows.
        legend_below: Whether one legend below the panels names the lines of all of them.
    """

    name: str
    caption: str
    data: tuple[str, ...]
    draw: tuple[Callable[[Any], None], ...]
    size: tuple[float, float] = (7.0, 3.2)
    claims: tuple[Claim, ...] = ()
    legend_below: bool = False

    def __repr__(self) -> str:
        return f"<Plot {self.name!r}: {len(self.draw)} panel{'s' if len(self.draw) > 1 else ''}>"


AGREES, DIFFERS, UNDECIDED, NOT_COMPARABLE = "agrees", "differs", "undecided", "not comparable"
VERDICTS = {AGREES: "agree", DIFFERS: "differ", UNDECIDED: "undecided", NOT_COMPARABLE: "not comparable"}
"""Verdict on a claim to its word after a number of claims."""
CLAIM_NOTE = (
    'The paper is "Supernodes and Halos", arXiv 2604.23475. Its numbers refer to WikiText-2 and to the models named. '
    '"Differs" means that a claim does not carry over to this model on this text. "Undecided" means that the interval '
    "includes both answers. Intervals are 95% bootstrap intervals of medians over FFNs."
)


@dataclass(frozen=True)
class Claim:
    """A statement of the paper beside the same number of this atlas.

    Attributes:
        statement: The claim.
        paper: The paper's number, with the model.
        measured: This atlas's number.
        verdict: Whether this atlas shows the same: ``AGREES``, ``DIFFERS``, ``UNDECIDED`` if the interval of its number
            includes both answers, ``NOT_COMPARABLE`` if the number or its interval is not known.
        criterion: Condition under which the atlas agrees.
    """

    statement: str
    paper: str
    measured: str
    verdict: str
    criterion: str


def above(found: Middle, limit: float) -> str:
    """Verdict on the claim that a median is above ``limit``, by the median's interval."""
    if not (np.isfinite(found.low) and np.isfinite(found.high)):
        return NOT_COMPARABLE
    return AGREES if found.low > limit else DIFFERS if found.high < limit else UNDECIDED


def below(found: Middle, limit: float) -> str:
    """Verdict on the claim that a median is below ``limit``, by the median's interval."""
    return {AGREES: DIFFERS, DIFFERS: AGREES}.get(verdict := above(found, limit), verdict)


def worst(verdicts: Iterable[str]) -> str:
    """Verdict on several claims together: the verdict that speaks most against them."""
    return max(verdicts, key=(AGREES, UNDECIDED, NOT_COMPARABLE, DIFFERS).index, default=NOT_COMPARABLE)


CLAIM_HEADINGS = ("the paper says", "its numbers", "here", "", "agrees if")
"""Headings of a table of `claim_rows`."""


@dataclass(frozen=True, eq=False, repr=False)
class Section:
    """One question.

    Attributes:
        key: Name of the section in ``report.json`` and in links.
        title: Subject of the question.
        text: Paragraphs.
        numbers: Name to value, for ``report.json`` and the section's table.
        missing: Parts of the answer that the atlas does not hold, and what would give them; empty if nothing is missing.
    """

    key: str
    title: str
    text: tuple[str, ...] = ()
    numbers: Mapping[str, float | int] = field(default_factory=dict)
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    claims: tuple[Claim, ...] = ()
    missing: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return (
            f"<Section {self.key!r}: {len(self.claims)} claims, {len(self.numbers)} numbers, {len(self.plots)} plots, "
            f"{len(self.tables)} tables>"
        )


def tally(sections: Iterable[Section]) -> dict[str, str]:
    """Verdict to its count and its word, such as ``3 hold``, in the order of `VERDICTS`. Verdicts without a claim are absent."""
    counts = Counter(claim.verdict for section in sections for claim in section.claims)
    return {verdict: f"{counts[verdict]} {word}" for verdict, word in VERDICTS.items() if counts[verdict]}


def counted(sections: Sequence[Section]) -> str:
    """How many claims of ``sections`` have each verdict, in words; empty without claims."""
    found = tally(sections)
    return f"{of_claims(sections)}: {', '.join(found.values())}." if found else ""


def of_claims(sections: Iterable[Section]) -> str:
    """The beginning of a line that counts verdicts."""
    return f"Of {sum(len(section.claims) for section in sections)} claims of the paper"


def data_names(plot: Plot) -> str:
    """The sentence that names the data files of ``plot``."""
    return f"Data: {', '.join(f'data/{name}.csv' for name in plot.data)}."


def claim_rows(sections: Iterable[Section]) -> Iterator[tuple[str, str, str, str, str]]:
    """A row for every claim of ``sections``, under `CLAIM_HEADINGS`."""
    for section in sections:
        for claim in section.claims:
            yield claim.statement, claim.paper, claim.measured, claim.verdict, claim.criterion
