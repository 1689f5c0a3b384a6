"""Log perplexity against sparsity: one line per method, protection and recovery, with the share of supernodes removed."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.errors import MissingPackageError
from chanfmt.base.files import atomic_file
from surgery.experiments.sweep_plan import DENSE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")
_MARKERS = "osD^vP*X<>"
_STYLES = ("-", "--", ":", "-.")


def draw(axes: Axes, rows: Sequence[dict[str, Any]], title: str = "") -> None:
    """Draw the rows of a sweep into matplotlib axes. The perplexity axis becomes logarithmic.

    Args:
        axes: Axes of a figure of yours.
        rows: `surgery.experiments.results.Results.rows` of a sweep.
        title: Title of the axes; empty for none.
    """
    lines = lines_of(rows)
    names = list(dict.fromkeys(method for method, _, _ in lines))
    kinds = list(dict.fromkeys((protect, recover) for _, protect, recover in lines))
    for (method, protect, recover), points in lines.items():
        x, y, hits, low, high = (np.array(values, dtype=np.float64) for values in zip(*points, strict=True))
        number, kind = names.index(method), kinds.index((protect, recover))
        color = f"C{number % 10}"
        axes.plot(
            x,
            y,
            color=color,
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4,
            linewidth=1.4,
            linestyle=_STYLES[kind % len(_STYLES)],
            label=", ".join(
                [method, *([] if protect == "none" else [f"{protect} protected"]), *([] if recover == "none" else [recover])]
            ),
        )
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        for place, height, hit in zip(x, y, hits, strict=True):
            if hit > 0:
                axes.annotate(
                    f"{hit:.0%}" if hit >= 0.01 else "<1%",
                    (place, height),
                    textcoords="offset points",
                    xytext=(0, 5),
                    ha="center",
                    fontsize=6,
                    color=color,
                )
    axes.set_yscale("log")
    axes.set_xlabel("share of FFN channels removed")
    axes.set_ylabel("perplexity")
    if title:
        axes.set_title(title, fontsize=10)
    axes.grid(which="both", alpha=0.2)
    if lines:
        axes.legend(fontsize=8, title="method (numbers: share of supernodes removed)", title_fontsize=7)


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
    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot(), rows, title)
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
    dense = next((row for row in rows if row["method"] == DENSE), None)
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


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else 0.0
