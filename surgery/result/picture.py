"""A picture of a cut, layer by layer, as SVG. It is written without a library, so that every machine writes the same bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from surgery.planning.plan import PruningPlan

_LEFT, _WIDTH, _HEIGHT, _GAP = 44, 640, 90, 46
_COLORS = {"channels": "#4c78a8", "supernodes": "#e45756", "LP": "#54a24b"}


def layer_picture(plan: PruningPlan) -> str:
    """The share of channels, supernodes and LP that every FFN keeps, in model order. An unknown share has no bar."""
    panels: list[tuple[str, list[float | None]]] = [
        ("channels", [block.n_kept / block.n_channels for block in plan.blocks]),
        ("supernodes", [block.supernodes_kept / block.supernodes if block.supernodes else None for block in plan.blocks]),
        ("LP", [block.lp_kept for block in plan.blocks]),
    ]
    height = len(panels) * (_HEIGHT + _GAP)
    body = [line for number, (name, shares) in enumerate(panels) for line in _panel(name, shares, 20 + number * (_HEIGHT + _GAP))]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 16} {height}" font-family="sans-serif" '
            'font-size="11">',
            f'<rect width="{_LEFT + _WIDTH + 16}" height="{height}" fill="#ffffff"/>',
            *body,
            "</svg>",
            "",
        ]
    )


def _panel(name: str, shares: Sequence[float | None], top: int) -> list[str]:
    step = _WIDTH / len(shares)
    lines = [f'<text x="{_LEFT}" y="{top - 6}">{name} kept</text>']
    for mark in (0, 0.5, 1):
        y = top + _HEIGHT * (1 - mark)
        lines += [
            f'<line x1="{_LEFT}" y1="{y:g}" x2="{_LEFT + _WIDTH}" y2="{y:g}" stroke="#dddddd"/>',
            f'<text x="{_LEFT - 4}" y="{y + 4:g}" text-anchor="end">{mark:.0%}</text>',
        ]
    for number, share in enumerate(shares):
        if share is not None:
            lines.append(
                f'<rect x="{_LEFT + (number + 0.1) * step:.2f}" y="{top + _HEIGHT * (1 - share):.2f}" '
                f'width="{0.8 * step:.2f}" height="{_HEIGHT * share:.2f}" fill="{_COLORS[name]}"/>'
            )
    for number in sorted({0, len(shares) // 2, len(shares) - 1}):
        lines.append(
            f'<text x="{_LEFT + (number + 0.5) * step:.2f}" y="{top + _HEIGHT + 14}" text-anchor="middle">{number}</text>'
        )
    return lines
