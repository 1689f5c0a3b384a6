"""The lines of the side panel, and the single line that stands for the panel in a narrow terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.format import schema
from tui.session import view
from tui.widgets import plots
from tui.widgets.text import count, left, number, percent

if TYPE_CHECKING:
    from tui.session.model import Browser
    from tui.widgets.lines import Line

AXIS = 6
"""Cells to the left of a plot for its axis labels."""
MIN_PLOT = 3
"""Fewest lines for which a plot is drawn."""


def overview_panel(browser: Browser, span: range, width: int, height: int) -> list[Line]:
    """The summary and plots of the FFNs ``span``: at most ``height`` lines of ``width`` cells."""
    row, summary = browser.snapshot.ffns[span[0]], browser.summary(span)
    channels = len(span) * row.n_channels
    name = (row if len(span) == 1 else replace(row, expert=None)).name(with_stack=True)
    measured = summary.concentration
    of_model = percent(measured.mass / browser.mass) if browser.mass > 0 else "-"
    lines: list[Line] = [
        [(name, "strong"), (f"  {row.module}", "dim")],
        _field(f"{browser.heading} mass", f"{number(measured.mass, 4)}  {of_model} of all"),
        _field(f"top {100 * browser.snapshot.rho:g}% share", percent(measured.top_share)),
        _field("n_eff", f"{count(measured.effective_channels)} of {channels:,}"),
        _field("max / mean", number(measured.max_over_mean, 4)),
        _field("gini", number(measured.gini, 4)),
        _field("labels", f"super {summary.supernodes:,}  halo {summary.halo:,}"),
    ]
    if len(span) > 1:
        lines.append(_field("experts", f"{len(span):,} of {row.n_channels:,} channels"))
    if summary.known < channels:
        lines.append(_field("unknown", f"{channels - summary.known:,} channels"))
    return lines + _plots(browser, span, width, height - len(lines))


def layer_panel(browser: Browser, ffn: int, channel: int, width: int, height: int) -> list[Line]:
    """Every metric of ``channel`` with its rank in FFN ``ffn``, then plots of the FFN: at most ``height`` lines of ``width`` cells."""
    snapshot, span = browser.snapshot, range(ffn, ffn + 1)
    ranking = browser.ranking(span)
    label = int(snapshot.labels_of(ffn)[channel])
    lines: list[Line] = [
        [(f"channel {channel}", "strong"), (f"  {schema.LABELS.get(label, str(label))}", "")],
        [(f" {'share of layer':<17}", "dim"), (f"{percent(float(ranking.share[channel]), 2):>10}", "")],
        [(f" {'metric':<17}{'value':>10}{'rank':>9}", "dim")],
    ]
    for name in snapshot.metrics:
        values = snapshot.values(ffn, name)
        value = float(values[channel])
        rank = "-" if np.isnan(value) else str(int((values > value).sum()) + 1)
        lines.append([(f" {left(name, 17)}{number(value, 4):>10}{rank:>9}", "strong" if name == browser.metric else "")])
    return lines + _plots(browser, span, width, height - len(lines))


def layer_line(browser: Browser, ffn: int) -> Line:
    """The summary of FFN ``ffn`` in one line."""
    summary = browser.summary(range(ffn, ffn + 1))
    measured = summary.concentration
    return [
        (
            f" layer: mass {number(measured.mass, 4)}  {browser.top_heading} {percent(measured.top_share)}  "
            f"n_eff {count(measured.effective_channels)}  super {summary.supernodes:,}  halo {summary.halo:,}",
            "dim",
        )
    ]


def mini_plots(browser: Browser, ffn: int, width: int) -> Line:
    """Lorenz curve and histogram in one line of ``width`` cells."""
    cells = min(30, (width - 20) // 2)
    if cells < 8:
        return []
    ranking = browser.ranking(range(ffn, ffn + 1))
    curve = view.curve_samples(ranking.curve, 2 * cells, log=browser.log_axis)
    counts, _, _ = plots.log_counts(ranking.values, cells)
    return [
        (" Lorenz ", "dim"),
        (plots.braille_curve(curve, 1)[0], ""),
        ("  log hist ", "dim"),
        (plots.histogram(counts, 1)[0], ""),
    ]


def _field(name: str, value: str) -> Line:
    return [(f" {left(name, 15)}", "dim"), (value, "")]


def _plots(browser: Browser, span: range, width: int, height: int) -> list[Line]:
    # Each plot needs an empty line and a title above it, and its axis below it.
    room = height - 4 - 3
    cells = width - AXIS - 1
    curve_height = min(12, room if room < 2 * MIN_PLOT else (room * 3) // 5)
    if curve_height < MIN_PLOT or cells < 20:
        return []
    lines = _lorenz(browser, span, cells, curve_height)
    if room >= 2 * MIN_PLOT:
        lines += _histogram(browser, span, cells, min(10, room - curve_height))
    return lines


def _lorenz(browser: Browser, span: range, cells: int, height: int) -> list[Line]:
    curve = browser.ranking(span).curve
    samples = view.curve_samples(curve, 2 * cells, log=browser.log_axis)
    drawn = plots.braille_curve(samples, height)
    labels = {0: "100%", height // 2: "50%", height - 1: "0%"}
    axis = "log rank" if browser.log_axis else "rank"
    ticks = plots.axis_labels(plots.rank_ticks(len(curve) - 1, log=browser.log_axis), cells)
    return [
        [],
        [(f"Lorenz: {browser.heading} in the top k, {axis}", "dim")],
        *([(f"{labels.get(row, ''):>{AXIS - 1}}┤", "dim"), (line, "")] for row, line in enumerate(drawn)),
        [(" " * (AXIS - 1) + "└" + "─" * cells, "dim")],
        [(" " * AXIS + ticks, "dim")],
    ]


def _histogram(browser: Browser, span: range, cells: int, height: int) -> list[Line]:
    counts, low, high = plots.log_counts(browser.ranking(span).values, cells)
    if low == high:
        return []
    indent = " " * AXIS
    ticks = plots.axis_labels(plots.decade_ticks(low, high, cells), cells)
    return [
        [],
        [(f"histogram of log10 {browser.heading} (√ counts)", "dim")],
        *([(indent + line, "")] for line in plots.histogram(counts, height)),
        [(indent + ticks, "dim")],
    ]
