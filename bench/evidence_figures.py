"""The figures of docs/evidence.md, drawn from the results of bench/evidence.py as SVG: the same bytes every time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bench.evidence_page import Measured, count, cuts_of, having
from chanfmt.analysis.resample import middle
from chanfmt.reporting import drawing, paper
from chanfmt.reporting.pages import render
from chanfmt.reporting.section import Plot

if TYPE_CHECKING:
    from collections.abc import Sequence


def figures(state: Sequence[Measured]) -> dict[str, bytes]:
    """Name of a file to its SVG, for every question that at least one model answers."""
    found = having(state, "statistics")
    plots = []
    if found:
        plots += [
            Plot(
                "evidence-concentration",
                "",
                (),
                (lambda axes: _depth(axes, found), lambda axes: _size(axes, found)),
                (8.5, 3.4),
                legend_below=True,
            ),
            Plot("evidence-factors", "", (), (lambda axes: _factors(axes, found),), (7.0, 3.2)),
            Plot(
                "evidence-controls",
                "",
                (),
                (
                    lambda axes: _by_depth(
                        axes, found, "spearman", "activation_power", "Spearman: LP, activation power", (-1, 1)
                    ),
                    lambda axes: _by_depth(
                        axes, found, "spearman", "write_norm", "Spearman: LP, norm of the write vector", (-1, 1)
                    ),
                ),
                (8.5, 3.2),
                legend_below=True,
            ),
        ]
    haloed = [model for model in found if len(model.column("halo", "halo"))]
    if haloed:
        plots.append(
            Plot(
                "evidence-halo",
                "",
                (),
                (
                    lambda axes: _by_depth(axes, haloed, "halo", "over_matched", "halo over matched channels", log=True),
                    lambda axes: _by_depth(axes, haloed, "halo", "over_null", "halo over its null", log=True),
                ),
                (8.5, 3.2),
                legend_below=True,
            )
        )
    compared = having(state, "texts")
    if compared:
        plots.append(Plot("evidence-texts", "", (), (lambda axes: _texts(axes, compared),), (7.5, 3.4), legend_below=True))
    removed = having(state, "channels")
    if removed:
        plots.append(
            Plot(
                "evidence-channels",
                "",
                (),
                tuple(_channels(model) for model in removed),
                (max(7.5, 3.0 * len(removed)), 3.2),
                legend_below=True,
            )
        )
    cut = [model for model in having(state, "cuts") if cuts_of(model)]
    if cut:
        texts = range(min(len((model.result("cuts") or {})["texts"]) for model in cut))
        plots.append(
            Plot("evidence-cuts", "", (), tuple(_cuts(cut, place) for place in texts), (4.2 * len(texts), 3.4), legend_below=True)
        )
    return {f"{plot.name}.svg": render(plot, "svg") for plot in plots}


def _places(values: np.ndarray) -> np.ndarray:
    """Depth from 0 to 1, so that models of different depths share an axis."""
    return np.linspace(0, 1, len(values)) if len(values) > 1 else np.zeros(len(values))


def _depth(axes: Any, state: Sequence[Measured]) -> None:
    _by_depth(axes, state, "concentration", "top_share", "share of LP in the top 1%")
    drawing.paper_line(axes, paper.TOP_SHARE)
    drawing.share_axis(axes)


def _by_depth(
    axes: Any,
    state: Sequence[Measured],
    table: str,
    column: str,
    title: str,
    limits: tuple[float, float] | None = None,
    *,
    log: bool = False,
) -> None:
    for number, model in enumerate(state):
        values = model.column(table, column)
        axes.plot(_places(values), values, label=model.name, **drawing.line_style(number))
    if log:
        axes.axhline(1, color=drawing.GREY, linewidth=0.8)
        drawing.log_axis(axes, np.concatenate([model.column(table, column) for model in state]))
    if limits:
        axes.axhline(0, color=drawing.GREY, linewidth=0.8)
        axes.set_ylim(*limits)
    axes.set_xlabel("depth, first FFN to last")
    axes.set_title(title)


def _size(axes: Any, state: Sequence[Measured]) -> None:
    for number, model in enumerate(state):
        found = model.middle("concentration", "top_share")
        errors = np.nan_to_num(np.abs([[found.median - found.low], [found.high - found.median]]))
        style = drawing.line_style(number)
        axes.errorbar([model.parameters], [found.median], yerr=errors, fmt=style["marker"], color=style["color"], capsize=2)
    drawing.paper_point(axes, 8.03e9, paper.TOP_SHARE)
    axes.set_xscale("log")
    ticks = [*(model.parameters for model in state), 8.03e9]
    axes.set_xticks(ticks, [count(round(value)) for value in ticks], rotation=30)
    axes.minorticks_off()
    axes.set_xlabel("parameters")
    axes.set_title("median FFN")
    drawing.share_axis(axes)


def _factors(axes: Any, state: Sequence[Measured]) -> None:
    names = list(paper.FACTORS)
    width = 0.8 / (len(state) + 1)
    for number, model in enumerate(state):
        found = [model.middle("factors", f"{name}_top_share") for name in names]
        x = np.arange(len(names)) + number * width
        errors = np.nan_to_num(np.abs([[item.median - item.low for item in found], [item.high - item.median for item in found]]))
        colour = drawing.COLOURS[number % len(drawing.COLOURS)]
        axes.bar(x, [item.median for item in found], width, yerr=errors, label=model.name, color=colour, capsize=2)
    x = np.arange(len(names)) + len(state) * width
    axes.bar(x, list(paper.FACTORS.values()), width, color=drawing.GREY, label=drawing.PAPER)
    axes.set_xticks(np.arange(len(names)) + 0.4 - width / 2, ["LP", "factored", "activation power", "curvature"])
    axes.set_title("share of the top 1%, median FFN")
    drawing.share_axis(axes)
    drawing.legend(axes)


def _texts(axes: Any, state: Sequence[Measured]) -> None:
    pairs: list[str] = []
    for model in state:
        result = model.result("texts") or {}
        pairs += [f"{result['same']['text']},\nmore of it", *(f"{pair['first']},\n{pair['second']}" for pair in result["pairs"])]
    pairs = list(dict.fromkeys(pairs))
    for number, model in enumerate(state):
        result = model.result("texts") or {}
        values = {f"{result['same']['text']},\nmore of it": result["same"]["jaccard"]}
        values |= {f"{pair['first']},\n{pair['second']}": pair["jaccard"] for pair in result["pairs"]}
        found = {name: middle(np.array(row, dtype=np.float64)) for name, row in values.items()}
        x = np.array([pairs.index(name) for name in found]) + (number - (len(state) - 1) / 2) * 0.15
        errors = np.nan_to_num(
            np.abs([[item.median - item.low for item in found.values()], [item.high - item.median for item in found.values()]])
        )
        style = drawing.line_style(number)
        axes.errorbar(
            x,
            [item.median for item in found.values()],
            yerr=errors,
            fmt=style["marker"],
            color=style["color"],
            label=model.name,
            capsize=2,
        )
    axes.set_xticks(range(len(pairs)), pairs)
    axes.set_title("Jaccard index of the supernodes, median FFN")
    drawing.share_axis(axes)


def _channels(model: Measured) -> Any:
    def draw(axes: Any) -> None:
        rows = [row for row in (model.result("channels") or {})["rows"] if row["module"] is not None]
        for number, layer in enumerate(dict.fromkeys(row["layers"] for row in rows)):
            some = [row for row in rows if row["layers"] == layer and row["lp"] > 0]
            style = drawing.line_style(number)
            axes.plot(
                [row["lp"] for row in some],
                [max(abs(row["delta_nll"]), 1e-9) for row in some],
                linestyle="",
                marker=style["marker"],
                color=style["color"],
                label=("first", "middle", "last")[number] + " FFN" if number < 3 else layer,
            )
        tokens = rows[0]["tokens"]
        lp = np.array(sorted(row["lp"] for row in rows if row["lp"] > 0))
        axes.plot(lp, lp, color=drawing.GREY, linewidth=0.8, label="LP")
        axes.plot(
            lp, np.sqrt(2 * lp / tokens), color=drawing.GREY, linestyle=":", linewidth=0.8, label="chance, sqrt(2 LP / tokens)"
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("LP, nats² per token")
        axes.set_title(f"{model.name}\n|change of the loss|, nats per token")

    return draw


def _cuts(state: Sequence[Measured], place: int) -> Any:
    def draw(axes: Any) -> None:
        for number, model in enumerate(state):
            rows = cuts_of(model)
            # One score is enough for a figure; the table has them all.
            first = next(method for method, _ in rows)
            for recover, line in (("none", "-"), ("lstsq", "--")):
                some = [
                    (share, losses[recover][place])
                    for (method, share), losses in rows.items()
                    if method == first and recover in losses
                ]
                if some:
                    x, y = [0.0, *(share for share, _ in some)], [0.0, *(item.difference for _, item in some)]
                    axes.plot(x, y, label=f"{model.name}, {recover}", **drawing.line_style(number) | {"linestyle": line})
        title = (model.result("cuts") or {})["texts"][place]
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        axes.set_xlabel("channels removed")
        axes.set_ylabel("nats per token above the dense model")
        axes.set_title(title)

    return draw
