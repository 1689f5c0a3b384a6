"""The table of screens. To add a screen, write its module and add a row here; the program reads everything else from the row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

About = Literal["model", "experts", "channels"]


@dataclass(frozen=True)
class ScreenRow:
    """One screen.

    Attributes:
        name: The name after ``--screen`` and ``--screenshot``, and in the names of exported files.
        factory: ``module:class`` of the screen. The program calls the class with the session and a `tui.session.place.Opening`.
        about: What the rows of the screen are: FFNs of the model, experts of an FFN, or channels of an FFN.
        on: The screen below this one; empty for the overview, which is always the lowest.
        key: The key that opens the screen from every screen with a table. Such a screen is open at most once.
        word: What the key line says after ``key``.
        sentence: What the help says after ``key``.
        needs_other: Whether the screen needs a second atlas.
        opened_by_below: Whether the screen below opens this one by itself, once it has computed what this one shows.
    """

    name: str
    factory: str
    about: About = "model"
    on: str = "overview"
    key: str = ""
    word: str = ""
    sentence: str = ""
    needs_other: bool = False
    opened_by_below: bool = False


REGISTRY = (
    ScreenRow("overview", "tui.screens.overview:OverviewScreen", on=""),
    ScreenRow("experts", "tui.screens.experts:ExpertsScreen", about="experts"),
    ScreenRow("layer", "tui.screens.layer:LayerScreen", about="channels"),
    ScreenRow("card", "tui.screens.card:CardScreen", about="channels", on="layer"),
    ScreenRow("scatter", "tui.screens.scatter:ScatterScreen", about="channels", on="layer"),
    ScreenRow("protect", "tui.screens.protect:ProtectScreen", key="p", word="protect", sentence="protect list"),
    ScreenRow("what-if", "tui.screens.what_if:WhatIfScreen", key="w", word="what-if", sentence="what a cut would leave"),
    ScreenRow(
        "compare",
        "tui.screens.compare:CompareScreen",
        key="c",
        word="compare",
        sentence="compare with another atlas",
        needs_other=True,
    ),
    ScreenRow(
        "join",
        "tui.screens.join:JoinScreen",
        about="channels",
        on="compare",
        needs_other=True,
        opened_by_below=True,
    ),
    ScreenRow("query", "tui.screens.query:QueryScreen", key="F", word="all layers", sentence="filter over all layers"),
)
ROW_OF = {row.name: row for row in REGISTRY}
SCREENS = tuple(ROW_OF)
OF_TWO = tuple(row.name for row in REGISTRY if row.needs_other)
"""Screens that need a second atlas."""


def path_to(name: str) -> list[ScreenRow]:
    """The rows from above the overview up to the screen ``name``, without screens that the screen below opens by itself."""
    rows: list[ScreenRow] = []
    while ROW_OF[name].on:
        rows.insert(0, ROW_OF[name])
        name = ROW_OF[name].on
    return [row for row in rows if not row.opened_by_below]
