"""What the concentration comes from: activations, gradients, or the two together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.analysis.concentration import concentration
from chanfmt.analysis.resample import middle
from chanfmt.report import drawing, paper
from chanfmt.report.section import Claim, Plot, Section, Table
from chanfmt.report.units import name_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.report.units import Unit

RHO = 0.01
NAMES = {"lp": "LP, E[(us)²]/2", "lp_factored": "factored, E[u²]E[s²]/2", "activation_power": "activation power, E[u²]",
         "curvature": "curvature, E[s²]"}


def make(units: Sequence[Unit]) -> Section:
    shares = {}
    for name in NAMES:
        row = []
        for unit in units:
            measured = unit.known(name)
            row.append(concentration(measured, RHO).top_share if len(measured) else np.nan)
        shares[name] = np.array(row)
    medians = {name: middle(values).median for name, values in shares.items()}
    columns = name_columns(units)
    known = {name: value for name, value in medians.items() if np.isfinite(value)}
    ours, theirs = (sorted(known, key=lambda name: -source[name]) for source in (known, paper.FACTORS))
    return Section(
        key="factors",
        title="Factors of the concentration",
        text=(
            "LP is the mean of a product. The factored proxy multiplies the means instead, so what it lacks comes from "
            "activation and gradient being large on the same tokens. Median share of the top 1% by each: "
            + ", ".join(f"{name} {value:.1%}" for name, value in known.items()) + ".",
        ),
        numbers={f"{name}_top_share_median": value for name, value in medians.items()},
        plots=(Plot(
            "factors",
            "Share of each quantity in its own top 1% of channels, by depth. Medians here: "
            + ", ".join(f"{NAMES[name]} {value:.1%}" for name, value in known.items())
            + f"; in the paper's {paper.MODEL}: " + ", ".join(f"{value:.1%}" for value in paper.FACTORS.values())
            + " in the same order.",
            ("factors",), lambda figure: _draw(figure, columns["ffn"], shares),
        ),),
        tables=(Table("factors", columns | {f"{name}_top_share": values for name, values in shares.items()}),),
        claims=(Claim(
            "LP is more concentrated than its factored form, that than activation power, that than curvature",
            ", ".join(f"{name} {paper.FACTORS[name]:.1%}" for name in theirs) + f" ({paper.MODEL})",
            ", ".join(f"{name} {known[name]:.1%}" for name in ours),
            None if len(known) < len(NAMES) else ours == theirs, "the medians over FFNs come in the same order",
        ),),
        missing=tuple(f"no {name} in this atlas" for name in NAMES if name not in known),
    )


def _draw(figure: Any, depth: np.ndarray, shares: dict[str, np.ndarray]) -> None:
    axes = figure.subplots()
    for number, (name, values) in enumerate(shares.items()):
        drawing.by_depth(axes, depth, values, number, NAMES[name])
    drawing.share_axis(axes)
    axes.set_xlabel("FFN, in model order")
    axes.set_title("share of the top 1%")
    drawing.legend(axes, ncols=2)
