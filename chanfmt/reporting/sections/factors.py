"""Whether the concentration comes from activations, from gradients, or from both together."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.analysis.mass import concentration
from chanfmt.analysis.resample import middle
from chanfmt.reporting import drawing, paper
from chanfmt.reporting.section import NOT_COMPARABLE, Claim, Plot, Section, Table, above, worst
from chanfmt.reporting.units import name_columns
from chanfmt.reporting.words import listed, percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.analysis.resample import Middle
    from chanfmt.format.unit import Unit

TITLE = "Factors of the concentration"
RHO = 0.01
NAMES = {
    "lp": "LP, E[(us)²]/2",
    "lp_factored": "factored, E[u²]E[s²]/2",
    "activation_power": "activation power, E[u²]",
    "curvature": "curvature, E[s²]",
}


def make(units: Sequence[Unit]) -> Section:
    """Make the section that compares the concentration of LP with the concentration of its factors."""
    shares = {}
    for name in NAMES:
        row = []
        for unit in units:
            measured = unit.known(name)
            row.append(concentration(measured, RHO).top_share if len(measured) else np.nan)
        shares[name] = np.array(row)
    columns = name_columns(units)
    found = {name: middle(values, columns["ffn"]) for name, values in shares.items()}
    known = [name for name in NAMES if found[name].count]
    missing = tuple(f"no {name} in this atlas" for name in NAMES if name not in known)
    if not set(known) - {"lp"}:
        return Section("factors", TITLE, missing=missing)
    # Differences within one FFN, so that differences between FFNs do not hide them.
    pairs = {
        f"{first} over {second}": middle(shares[first] - shares[second], columns["ffn"])
        for first, second in itertools.pairwise(paper.FACTORS)
    }
    claims = (
        Claim(
            "Concentration falls from LP to its factored form, to activation power, to curvature",
            f"{', '.join(f'{name} {value:.1%}' for name, value in paper.FACTORS.items())} ({paper.MODEL})",
            ", ".join(f"{name} {_points(item)}" for name, item in pairs.items() if item.count),
            NOT_COMPARABLE if missing else worst(above(item, 0.0) for item in pairs.values()),
            "every step's difference within an FFN has a median above zero",
        ),
    )
    return Section(
        key="factors",
        title=TITLE,
        text=(
            "LP is the mean of a product. The factored proxy multiplies the means instead. The difference comes from tokens "
            "on which activation and gradient are large together. Median share in the top 1% by each metric: "
            f"{listed(found.items(), percent)}.",
        ),
        numbers={f"{name}_top_share_median": found[name].median for name in known}
        | {f"{name.replace(' ', '_')}_median": item.median for name, item in pairs.items() if item.count},
        plots=(
            Plot(
                "factors",
                "Share of each metric in its own top 1% of the channels, by depth; dotted: the paper's medians. "
                f"Medians here: {listed(((NAMES[name], item) for name, item in found.items()), percent)}.",
                ("factors",),
                (lambda axes: draw_shares(axes, columns["ffn"], shares),),
                claims=claims,
                legend_below=True,
            ),
        ),
        tables=(Table("factors", columns | {f"{name}_top_share": shares[name] for name in known}),),
        claims=claims,
        missing=missing,
    )


def _points(found: Middle) -> str:
    """A difference of shares in percentage points."""
    interval = f" ({100 * found.low:+.1f} to {100 * found.high:+.1f})" if np.isfinite(found.low) else ""
    return f"{100 * found.median:+.1f}{interval} points"


def draw_shares(axes: Any, depth: np.ndarray, shares: dict[str, np.ndarray]) -> None:
    """Draw the share of each metric in its own top 1% of the channels into matplotlib ``axes``, by depth.

    Args:
        depth: Place of each unit's FFN in model order, (unit,).
        shares: Metric of `NAMES` to the share of each unit, (unit,).
    """
    for number, (name, values) in enumerate(shares.items()):
        drawing.by_depth(axes, depth, values, number, NAMES[name])
        drawing.paper_line(axes, paper.FACTORS[name], number)
    drawing.share_axis(axes)
    drawing.depth_axis(axes)
    axes.set_title("share of the top 1%")
