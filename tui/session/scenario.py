"""The question of the what-if screen (method, protection, allocation, sparsity), its answer, and the command that cuts so."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.errors import ChanfmtError
from surgery.planning.methods import METHODS
from surgery.planning.options import ALLOCATIONS, PlanOptions
from surgery.planning.what_if import WhatIf, total
from tui.session.load import reopened
from tui.session.protect import to_blocks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tui.session.load import Snapshot

PROTECTIONS: tuple[tuple[str, ...], ...] = ((), ("supernodes",), ("supernodes+halo",))
PLAN = PlanOptions(0.5)
"""What ``surgery plan`` does by default: the first question."""
HIGHEST = 95
"""Highest sparsity that the screen offers, in percent."""


@dataclass(frozen=True)
class Scenario:
    """One question.

    Attributes:
        method: Name in `METHODS`.
        protect: Selectors, as after ``surgery plan --protect``.
        marked: Whether the marked channels are also protected.
        allocation: One of `ALLOCATIONS`.
        percent: Sparsity in percent, 1 to `HIGHEST`.
    """

    method: str = PLAN.method
    protect: tuple[str, ...] = ()
    marked: bool = False
    allocation: str = PLAN.allocation
    percent: int = 50

    @property
    def options(self) -> PlanOptions:
        """The scenario as options of `surgery.planning.plan`, without the marks."""
        return PlanOptions(self.percent / 100, self.method, protect=self.protect, allocation=self.allocation)

    def with_percent(self, percent: int) -> Scenario:
        """This scenario with the sparsity nearest to ``percent`` that the screen offers."""
        return replace(self, percent=max(1, min(percent, HIGHEST)))

    def next_method(self, step: int) -> Scenario:
        """This scenario with the method ``step`` places further in the list of methods."""
        names = list(METHODS)
        return replace(self, method=names[(names.index(self.method) + step) % len(names)])

    def next_allocation(self) -> Scenario:
        """This scenario with the next allocation."""
        return replace(self, allocation=ALLOCATIONS[(ALLOCATIONS.index(self.allocation) + 1) % len(ALLOCATIONS)])

    def next_protection(self, *, marks: bool) -> Scenario:
        """This scenario with the next of `PROTECTIONS`: first each of them alone, then, if there are ``marks``, each with the marks."""
        choices = [(protect, marked) for marked in (False, True)[: 1 + marks] for protect in PROTECTIONS]
        now = (self.protect, self.marked)
        protect, marked = choices[(choices.index(now) + 1) % len(choices) if now in choices else 0]
        return replace(self, protect=protect, marked=marked)

    def protection_text(self) -> str:
        """What is protected, in words."""
        return " + ".join((*self.protect, *(["marks"] if self.marked else []))) or "none"

    def command(self, atlas: str, marks_file: str, *, allow_padding: bool = False) -> str:
        """The ``surgery prune`` command that makes this cut.

        Args:
            marks_file: The protect file with the marks.
            allow_padding: Whether the file would hardly shrink, so that the command must allow it.
        """
        protect = (*self.protect, *([marks_file] if self.marked else []))
        return shlex.join(
            [
                "surgery",
                "prune",
                atlas,
                "--method",
                self.method,
                "--sparsity",
                f"{self.percent / 100:g}",
                *(part for selector in protect for part in ("--protect", selector)),
                *(["--allocation", self.allocation] if self.allocation != "uniform" else []),
                *(["--allow-padding"] if allow_padding else []),
            ]
        )


def answer(scenario: Scenario, snapshot: Snapshot, marks: Mapping[int, np.ndarray]) -> WhatIf:
    """Score and sort the channels of ``snapshot`` as ``scenario`` asks; ``marks`` are FFN to bool (channel,).

    Raises:
        AtlasError: The FFNs of the file have changed.
        ChanfmtError: The atlas lacks what the method or the protection needs.
    """
    with reopened(snapshot) as atlas:
        return WhatIf(atlas, scenario.options, to_blocks(marks, atlas) if scenario.marked else None)


def kept_curve(what_if: WhatIf) -> np.ndarray:
    """Share of the model's LP that is kept at sparsities of 1% to `HIGHEST`%, float64 (HIGHEST,); NaN if the cut is refused."""
    shares = np.full(HIGHEST, np.nan)
    for percent_cut in range(1, HIGHEST + 1):
        try:
            share = total(what_if.at(percent_cut / 100)).lp_share
        except ChanfmtError:
            continue
        shares[percent_cut - 1] = np.nan if share is None else share
    return shares
