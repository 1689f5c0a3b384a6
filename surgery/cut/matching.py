"""Match the FFNs of a loaded model with those of an atlas or a plan."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.models.ffn import FFN
    from chanfmt.models.stored.weights import Described


def match_ffns(blocks: Sequence[Described], ffns: Sequence[FFN]) -> list[FFN | None]:
    """The FFN that belongs to each of ``blocks``; None if there is none.

    FFNs with the same module, width and number of experts are paired in model order.
    """
    found: dict[tuple[str, int, int], list[FFN]] = defaultdict(list)
    for ffn in ffns:
        found[ffn.container, ffn.width, ffn.experts].append(ffn)
    matched: list[FFN | None] = []
    for block in blocks:
        alike = found[block.module, block.n_channels, block.n_experts]
        matched.append(alike.pop(0) if alike else None)
    return matched
