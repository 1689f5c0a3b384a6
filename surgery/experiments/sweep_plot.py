"""Log perplexity against sparsity, one line per method, protection and recovery; and the contenders on a linear axis."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.errors import MissingPackageError
from chanfmt.base.files import atomic_file
from surgery.experiments.sweep_plan import DENSE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")
_MARKERS = "osD^vP*X<>"
_STYLES = ("-", "--", ":", "-.")
_CONTENDERS = 6
_NEAR = 0.02
"""Difference of two sparsities that comes from the rounding of widths."""
_EQUAL = 0.01
"""Nats per token below which a loss above the dense model's counts as none."""


def draw(axes: Axes, rows: Sequence[dict[str, Any]], title: str = "") -> None:
    """Draw the rows of a sweep into matplotlib axes. The perplexity axis becomes logarithmic.

    Args:
        axes: Axes of a figure of yours.
        rows: `surgery.experiments.results.Results.rows` of a sweep.
        title: Title of the axes; empty for none.
    """
    lines = lines_of(rows)
    styles = _styles(lines)
    for line, points in lines.items():
        x, y, hits, low, high = (np.array(values, dtype=np.float64) for values in zip(*points, strict=True))
        axes.plot(x, y, **styles[line])
        axes.fill_between(x, low, high, color=styles[line]["color"], alpha=0.15, linewidth=0)
        for place, height, hit in zip(x, y, hits, strict=True):
            if hit > 0:
                axes.annotate(
                    f"{hit:.0%}" if hit >= 0.01 else "<1%",
                    (place, height),
                    textcoords="offset points",
                    xytext=(0, 5),
                    ha="center",
                    fontsize=6,
                    color=styles[line]["color"],
                )
    dense = _dense(rows)
    if lines and dense is not None:
        axes.axhline(
            dense["perplexity"], color="black", linewidth=1, linestyle=(0, (1, 2)), label=f"dense: {dense['perplexity']:.4g}"
        )
    axes.set_yscale("log")
    axes.set_xlabel("share of FFN channels removed")
    axes.set_ylabel("perplexity")
    if title:
        axes.set_title(title, fontsize=10)
    axes.grid(which="both", alpha=0.2)
    if lines:
        axes.legend(fontsize=8, title="method (numbers: share of supernodes removed)", title_fontsize=7)


def draw_contenders(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the best lines of a sweep alone, as loss above the dense model on a linear axis, where they can be told apart.

    The axes are empty if there are no `contenders`.
    """
    dense, lines = _dense(rows), lines_of(rows)
    styles = _styles(lines)
    for line in contenders(rows):
        assert dense is not None
        x, y, _, low, high = (np.array(values, dtype=np.float64) for values in zip(*lines[line], strict=True))
        axes.plot(x, np.log(y) - dense["nll"], **styles[line])
        axes.fill_between(
            x, np.log(low) - dense["nll"], np.log(high) - dense["nll"], color=styles[line]["color"], alpha=0.15, linewidth=0
        )
    axes.axhline(0, color="black", linewidth=1, linestyle=(0, (1, 2)), label="dense")
    axes.set_xlabel("share of FFN channels removed")
    axes.set_ylabel("nats per token above the dense model")
    axes.set_title("the contenders", fontsize=10)
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8)


def contenders(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The lines that a choice is between: at most `_CONTENDERS`, the best first, by the loss at the largest sparsity of all.

    A line whose loss above the dense model is more than twice that of the best one is none. Empty if fewer than two lines
    reach the largest sparsity, or if the dense model was not measured.
    """
    dense, lines = _dense(rows), lines_of(rows)
    if dense is None or not lines:
        return []
    largest = max(points[-1][0] for points in lines.values())
    above = {
        line: float(np.log(points[-1][1])) - dense["nll"] for line, points in lines.items() if points[-1][0] >= largest - _NEAR
    }
    ranked = sorted(above, key=lambda line: above[line])
    if len(ranked) < 2:
        return []
    # If the best cut is as good as the dense model, no other line is within twice its loss.
    limit = 2 * max(above[ranked[0]], _EQUAL)
    return [line for line in ranked if above[line] <= limit][:_CONTENDERS]


def write_figure(rows: Sequence[dict[str, Any]], stem: Path, title: str) -> tuple[Path, ...]:
    """Write a figure of a sweep's rows to ``stem`` with each of `SUFFIXES`. Returns the files.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ChanfmtError: A file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("matplotlib", "plot", "the figure of a sweep") from None
    several = len(contenders(rows)) > 1
    figure = Figure(figsize=(14 if several else 9, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + several, squeeze=False)[0]
    draw(panels[0], rows, title)
    if several:
        draw_contenders(panels[1], rows)
    files = []
    for suffix in SUFFIXES:
        path = stem.with_name(stem.name + suffix)
        with atomic_file(path, overwrite=True) as temporary:
            figure.savefig(temporary, format=suffix.removeprefix("."))
        files.append(path)
    return tuple(files)


def lines_of(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], list[tuple[float, float, float, float, float]]]:
    """Method, protection and recovery to points: sparsity, perplexity, share of supernodes removed, lowest and highest perplexity.

    All seeds together are one point: the geometric mean of their perplexities, the mean share of supernodes, and the range.
    Every line starts at the dense model.
    """
    dense = _dense(rows)
    start = [] if dense is None else [(0.0, dense["perplexity"], 0.0, dense["perplexity"], dense["perplexity"])]
    groups: dict[tuple[str, str, str], dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        # A perplexity beyond float64 is not drawn.
        if row["method"] != DENSE and row["perplexity"] is not None:
            groups[row["method"], row["protect"], row["recover"]][row["sparsity_reached"]].append(row)
    return {
        line: [
            *start,
            *(
                (
                    sparsity,
                    float(np.exp(np.mean([row["nll"] for row in alike]))),
                    _mean([row["hit_rate"] for row in alike]),
                    min(row["perplexity"] for row in alike),
                    max(row["perplexity"] for row in alike),
                )
                for sparsity, alike in sorted(by_sparsity.items())
            ),
        ]
        for line, by_sparsity in groups.items()
    }


def _dense(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the dense model; None if it is not there, or beyond float64."""
    return next((row for row in rows if row["method"] == DENSE and row["perplexity"] is not None), None)


def _styles(lines: Iterable[tuple[str, str, str]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What tells the lines apart, the same in every panel: a colour and a marker per method, and a dash per kind."""
    lines = list(lines)
    names = list(dict.fromkeys(method for method, _, _ in lines))
    kinds = list(dict.fromkeys((protect, recover) for _, protect, recover in lines))
    return {
        (method, protect, recover): {
            "color": f"C{names.index(method) % 10}",
            "marker": _MARKERS[names.index(method) % len(_MARKERS)],
            "markersize": 4,
            "linewidth": 1.4,
            "linestyle": _STYLES[kinds.index((protect, recover)) % len(_STYLES)],
            "label": ", ".join(
                [method, *([] if protect == "none" else [f"{protect} protected"]), *([] if recover == "none" else [recover])]
            ),
        }
        for method, protect, recover in lines
    }


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else 0.0
