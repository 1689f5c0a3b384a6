"""A picture of a cut, layer by layer, as SVG. It is written without a library, so that every machine writes the same bytes."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from surgery.planning.plan import BlockPlan, PruningPlan

_LEFT, _TOP, _WIDTH, _HEIGHT, _RIGHT, _BOTTOM = 52, 52, 640, 150, 16, 40
_BAR, _LOST, _GRID, _TEXT, _FAINT = "#4c78a8", "#c0392b", "#dddddd", "#222222", "#666666"
_STEPS = (1, 2, 5)


def layer_picture(plan: PruningPlan) -> str:
    """What every FFN loses: a bar for the share of its LP that the cut removes, in model order.

    The axis ends just above the largest share. A red number above a bar counts the supernodes that are removed from that FFN.
    If the LP of no FFN is known, the bars are shares of channels. An unknown share has no bar.
    """
    lost = [None if block.lp_kept is None else max(0.0, 1 - block.lp_kept) for block in plan.blocks]
    removed = [1 - block.n_kept / block.n_channels for block in plan.blocks]
    known = any(share is not None for share in lost)
    shares: Sequence[float | None] = lost if known else removed
    end = _axis_end(max((share for share in shares if share is not None), default=0.0))
    width, height = _LEFT + _WIDTH + _RIGHT, _TOP + _HEIGHT + _BOTTOM
    heading = "LP that the cut removes from each FFN" if known else "channels that the cut removes from each FFN"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11" '
            f'fill="{_TEXT}">',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            f'<text x="{_LEFT}" y="18" font-size="13">{heading}</text>',
            f'<text x="{_LEFT}" y="34" fill="{_FAINT}">{_summary(plan.blocks, shares, removed)}</text>',
            *_axis(end),
            *_bars(plan.blocks, shares, end),
            f'<text x="{_LEFT + _WIDTH / 2:g}" y="{height - 6}" text-anchor="middle">FFN, in model order</text>',
            "</svg>",
            "",
        ]
    )


def _summary(blocks: Sequence[BlockPlan], shares: Sequence[float | None], removed: Sequence[float]) -> str:
    """What the bars say, in one line."""
    known = [(share, number) for number, share in enumerate(shares) if share is not None]
    low, high = min(removed), max(removed)
    channels = f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"
    parts = [f"{channels} of the channels of an FFN"]
    if known:
        most, number = max(known)
        parts.append(f"median {median(share for share, _ in known):.1%}, most {most:.1%} (FFN {number})")
    gone = sum(block.supernodes - block.supernodes_kept for block in blocks)
    total = sum(block.supernodes for block in blocks)
    if total:
        parts.append(f"{gone} of {total} supernodes (in red)" if gone else f"none of {total} supernodes")
    return "; ".join(parts)


def _axis_end(most: float) -> float:
    """The end of the axis: a round share that is at least ``most``, and not 0."""
    if most <= 0:
        return 0.01
    power = 10.0 ** math.floor(math.log10(most))
    return min(next((step * power for step in _STEPS if step * power >= most), 10 * power), 1.0)


def _axis(end: float) -> list[str]:
    lines = []
    for mark in (0.0, 0.5, 1.0):
        y = _TOP + _HEIGHT * (1 - mark)
        lines += [
            f'<line x1="{_LEFT}" y1="{y:g}" x2="{_LEFT + _WIDTH}" y2="{y:g}" stroke="{_GRID}"/>',
            f'<text x="{_LEFT - 5}" y="{y + 4:g}" text-anchor="end">{100 * mark * end:.3g}%</text>',
        ]
    return lines


def _bars(blocks: Sequence[BlockPlan], shares: Sequence[float | None], end: float) -> list[str]:
    step = _WIDTH / len(shares)
    lines = []
    for number, (block, share) in enumerate(zip(blocks, shares, strict=True)):
        height = _HEIGHT * min(1.0, (share or 0.0) / end)
        if share is not None:
            lines.append(
                f'<rect x="{_LEFT + (number + 0.1) * step:.2f}" y="{_TOP + _HEIGHT - height:.2f}" width="{0.8 * step:.2f}" '
                f'height="{height:.2f}" fill="{_BAR}"/>'
            )
        gone = block.supernodes - block.supernodes_kept
        if gone:
            lines.append(
                f'<text x="{_LEFT + (number + 0.5) * step:.2f}" y="{_TOP + _HEIGHT - height - 3:.2f}" text-anchor="middle" '
                f'font-size="9" fill="{_LOST}">{gone}</text>'
            )
    for number in sorted({0, len(shares) // 4, len(shares) // 2, 3 * len(shares) // 4, len(shares) - 1}):
        lines.append(
            f'<text x="{_LEFT + (number + 0.5) * step:.2f}" y="{_TOP + _HEIGHT + 14}" text-anchor="middle">{number}</text>'
        )
    return lines
