"""What the what-if screen asks: method, protection, allocation, sparsity, and the command line that does the same."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace

from surgery.planning.methods import METHODS
from surgery.planning.options import ALLOCATIONS, PlanOptions

PROTECTIONS: tuple[tuple[str, ...], ...] = ((), ("supernodes",), ("supernodes+halo",))
HIGHEST = 95
"""Percent, as far as the slider goes."""


@dataclass(frozen=True)
class Scenario:
    """One question.

    Attributes:
        protect: Selectors, as after ``surgery plan --protect``.
        marked: Whether the marked channels are protected too.
        percent: Sparsity in percent, 1 to `HIGHEST`.
    """

    method: str = "magnitude"
    protect: tuple[str, ...] = ()
    marked: bool = False
    allocation: str = "uniform"
    percent: int = 50

    @property
    def options(self) -> PlanOptions:
        """As `surgery.planning.plan` takes it, but for the marks."""
        return PlanOptions(self.percent / 100, self.method, protect=self.protect, allocation=self.allocation)

    def with_percent(self, percent: int) -> Scenario:
        return replace(self, percent=max(1, min(percent, HIGHEST)))

    def next_method(self, step: int) -> Scenario:
        names = list(METHODS)
        return replace(self, method=names[(names.index(self.method) + step) % len(names)])

    def next_allocation(self) -> Scenario:
        return replace(self, allocation=ALLOCATIONS[(ALLOCATIONS.index(self.allocation) + 1) % len(ALLOCATIONS)])

    def next_protection(self, *, marks: bool) -> Scenario:
        """The next of `PROTECTIONS`, each without and then, where there are ``marks``, with them."""
        choices = [(protect, marked) for marked in (False, True)[: 1 + marks] for protect in PROTECTIONS]
        now = (self.protect, self.marked)
        protect, marked = choices[(choices.index(now) + 1) % len(choices) if now in choices else 0]
        return replace(self, protect=protect, marked=marked)

    def protection_text(self) -> str:
        """What is protected, in words."""
        return " + ".join((*self.protect, *(["marks"] if self.marked else []))) or "none"

    def command(self, atlas: str, marks_file: str) -> str:
        """The ``surgery prune`` command that cuts this way; ``marks_file`` holds the marks."""
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
            ]
        )
