"""The comparison that the compare screen and the join show: computed in a thread, swapped on request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tui.session.comparison import make_comparison

if TYPE_CHECKING:
    from tui.session.comparison import Comparison
    from tui.session.front import Host
    from tui.session.load import Snapshot


class Comparing:
    """A comparison of the two atlases of a session.

    Attributes:
        comparison: The numbers, or None if there are none.
        refusal: Why there are no numbers; empty if there are.
        swapped: Whether the atlas of the session is B.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self.comparison: Comparison | None = None
        self.refusal = "comparing"
        self.swapped = False
        # A result with an older generation has been overtaken and is dropped.
        self._generation = 0

    @property
    def pair(self) -> tuple[Snapshot, Snapshot]:
        """A and B."""
        ours, other = self._host.snapshots
        return (other, ours) if self.swapped else (ours, other)

    def compute(self, metric: str) -> None:
        """Compare by ``metric``, and show the numbers."""
        self._generation += 1
        generation, (first, second) = self._generation, self.pair
        self._host.front.start(
            lambda: make_comparison(first, second, metric),
            lambda comparison: self._have(generation, comparison, ""),
            refused=lambda reason: self._have(generation, None, reason),
            group="compare",
        )

    def swap(self, metric: str) -> None:
        """Exchange A and B."""
        self.swapped = not self.swapped
        self.comparison, self.refusal = None, "comparing"
        self.compute(metric)

    def _have(self, generation: int, comparison: Comparison | None, refusal: str) -> None:
        if generation == self._generation:
            self.comparison, self.refusal = comparison, refusal
            self._host.front.show_comparison()
