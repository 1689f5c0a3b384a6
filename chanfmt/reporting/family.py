"""``atlas report`` of several atlases: one page for a family of models, or for one model on several texts.

The verdicts are those of each atlas's own report. The figures have one line for each atlas, from the tables of these reports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra.compare import check_same_ffns, compare, medians, shared_text_note, special_tokens_note
from chanfmt.base.errors import AtlasError, UsageError
from chanfmt.base.narrate import counted
from chanfmt.base.text import one_line, significant
from chanfmt.reporting import drawing, paper
from chanfmt.reporting.make import Report, make_report
from chanfmt.reporting.section import Plot, Section, Table
from chanfmt.reporting.sections import concentrated, factors
from chanfmt.reporting.words import percent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chanfmt.format.reader import Atlas


def make_family(atlases: Sequence[Atlas], names: Sequence[str]) -> Report:
    """Make the report of several atlases, of one model or of several.

    Args:
        names: Name of each atlas in the report, all different.

    Raises:
        UsageError: Fewer than two atlases.
        AtlasError: An atlas holds no measured LP.
    """
    if len(atlases) < 2:
        raise UsageError("a report of a family needs two atlases or more", hint="name another atlas")
    # A file may have a name that no encoding has.
    names = [one_line(name) for name in names]
    members = {name: make_report(atlas) for name, atlas in zip(names, counted(atlases, "atlas", "report"), strict=True)}
    sections = [_concentration(members), _factors(members), *_controls(members), *_halo(members), *_stability(members)]
    notes = [f"{name}: {note}" for name, report in members.items() for note in report.notes]
    try:
        for atlas in atlases[1:]:
            check_same_ffns(atlases[0], atlas)
    except AtlasError:
        alike = False
    else:
        alike = True
        sections.append(_overlap(atlases, names))
        pair = [
            (note, name) for atlas, name in zip(atlases[1:], names[1:], strict=True) for note in _pair_notes(atlases[0], atlas)
        ]
        notes += [f"{names[0]} and {name}: {note}." for note, name in pair]
    models = list(dict.fromkeys(one_line(atlas.model.id) for atlas in atlases))
    return Report(
        title=f"Importance atlases of {models[0] if len(models) == 1 else f'{len(models)} models'}",
        facts={
            "atlases": f"{len(atlases)}: {', '.join(names)}",
            "FFNs": "the same in all atlases" if alike else "not the same in all atlases",
        },
        notes=tuple(notes),
        sections=tuple(sections),
        members=members,
    )


def _pair_notes(first: Atlas, second: Atlas) -> list[str]:
    return [note.sentence for note in (special_tokens_note(first, second), shared_text_note(first, second)) if note]


def _columns(members: Mapping[str, Report], name: str) -> dict[str, Mapping[str, np.ndarray]]:
    """The columns of the table ``name`` of every report that has it."""
    tables = {key: report.table(name) for key, report in members.items()}
    return {key: table.columns for key, table in tables.items() if table is not None}


def _together(name: str, columns: Mapping[str, Mapping[str, np.ndarray]]) -> Table:
    """The tables of several atlases below each other, with the columns that all of them have and the atlas's name."""
    shared = [key for key in next(iter(columns.values())) if all(key in other for other in columns.values())]
    rows = {key: len(next(iter(table.values()))) for key, table in columns.items()}
    return Table(
        name,
        {
            "atlas": np.repeat(list(rows), list(rows.values())),
            **{key: np.concatenate([table[key] for table in columns.values()]) for key in shared},
        },
    )


def _lines(columns: Mapping[str, Mapping[str, np.ndarray]], key: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {name: (table["ffn"], table[key]) for name, table in columns.items() if key in table}


def _numbers(members: Mapping[str, Report], section: str, key: str) -> dict[str, float]:
    """One number of a section of every report that has it."""
    found = {name: report.section(section).numbers.get(key) for name, report in members.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def _said(numbers: Mapping[str, float], show: Any) -> str:
    return ", ".join(f"{name} {show(value)}" for name, value in numbers.items())


def _concentration(members: Mapping[str, Report]) -> Section:
    columns, curves = _columns(members, "concentration"), _columns(members, "cumulative")
    median = _numbers(members, "concentration", "top_share_median")
    shapes = {
        name: (table["fraction"][: concentrated.POINTS], table["share"].reshape(-1, concentrated.POINTS))
        for name, table in curves.items()
    }
    return Section(
        key="concentration",
        title="Concentration of the loss proxy",
        text=(f"Share of LP in the top 1% of the channels, median FFN: {_said(median, percent)}.",),
        numbers={f"{name}: top_share_median": value for name, value in median.items()},
        plots=(
            Plot(
                "concentration",
                "Left: share of an FFN's LP mass in its top 1% of the channels, by depth. Right: its largest channel over its mean. "
                "One line for each atlas; FFNs with experts show the median and range of the experts.",
                ("concentration",),
                (
                    lambda axes: concentrated.draw_top_share(axes, _lines(columns, "top_share")),
                    lambda axes: concentrated.draw_largest(axes, _lines(columns, "max_over_mean")),
                ),
                legend_below=True,
            ),
            Plot(
                "cumulative",
                "Share of the LP mass in an FFN's largest channels, median FFN of each atlas; dashed grey: an evenly spread mass.",
                ("cumulative",),
                (lambda axes: concentrated.draw_median_curves(axes, shapes),),
                (7.0, 3.6),
                legend_below=True,
            ),
        ),
        tables=(_together("concentration", columns), _together("cumulative", curves)),
    )


def _factors(members: Mapping[str, Report]) -> Section:
    shares = {
        name: np.array([report.section("factors").numbers.get(f"{key}_top_share_median", np.nan) for key in factors.NAMES])
        for name, report in members.items()
    }
    table = Table(
        "factors",
        {
            "atlas": np.repeat(list(shares), len(factors.NAMES)),
            "metric": np.tile(list(factors.NAMES), len(shares)),
            "top_share_median": np.concatenate(list(shares.values())),
        },
    )
    return Section(
        key="factors",
        title=factors.TITLE,
        text=("A metric that is spread alike over the channels would have 1% in its top 1%.",),
        plots=(
            Plot(
                "factors",
                "Share of each metric in its own top 1% of the channels, median FFN of each atlas; stars: the paper's medians.",
                ("factors",),
                (lambda axes: draw_factors(axes, shares),),
                legend_below=True,
            ),
        ),
        tables=(table,),
    )


def _controls(members: Mapping[str, Report]) -> list[Section]:
    columns, sweeps = _columns(members, "spearman"), _columns(members, "overlap")
    lines = _lines(columns, "activation_power")
    if not lines:
        return []
    power = {
        name: tuple(
            table[key][table["metric"] == "activation_power"] for key in ("share_of_channels", "jaccard_median", "chance")
        )
        for name, table in sweeps.items()
        if "activation_power" in table["metric"]
    }
    median = _numbers(members, "controls", "spearman_activation_power_median")
    return [
        Section(
            key="controls",
            title="LP against activation power",
            text=(
                f"Spearman's correlation of LP and activation power, median FFN: {_said(median, lambda v: significant(v, 3))}.",
            ),
            numbers={f"{name}: spearman_activation_power_median": value for name, value in median.items()},
            plots=(
                Plot(
                    "controls",
                    "Left: Spearman's correlation of LP and activation power over an FFN's channels, by depth. Right: Jaccard index "
                    "of the top sets by both, against the size of the sets; median over FFNs. Grey: sets drawn at random.",
                    ("spearman", "overlap"),
                    (lambda axes: draw_correlation(axes, lines), lambda axes: draw_overlap(axes, power)),
                    legend_below=True,
                ),
            ),
            tables=(_together("spearman", columns), _together("overlap", sweeps)),
        )
    ]


def _halo(members: Mapping[str, Report]) -> list[Section]:
    columns = _columns(members, "halo")
    if not columns:
        return []
    median = _numbers(members, "halo", "halo_over_matched_median")
    return [
        Section(
            key="halo",
            title="Redundancy of the halo",
            text=(
                "Redundancy of the halo to the supernodes, over the redundancy of as many other channels of similar LP, median "
                f"FFN: {_said(median, lambda v: significant(v, 3))}.",
            ),
            numbers={f"{name}: halo_over_matched_median": value for name, value in median.items()},
            plots=(
                Plot(
                    "halo",
                    "Mean redundancy of the halo to the supernodes, over that of other channels, by depth. Left: channels matched in "
                    "LP. Right: all other channels. Grey: as redundant as these channels.",
                    ("halo",),
                    (
                        lambda axes: draw_ratio(axes, _lines(columns, "over_matched"), "halo over matched channels"),
                        lambda axes: draw_ratio(axes, _lines(columns, "over_others"), "halo over all others"),
                    ),
                    legend_below=True,
                ),
            ),
            tables=(_together("halo", columns),),
            missing=tuple(f"{name} holds no redundancy" for name in members if name not in columns),
        )
    ]


def _stability(members: Mapping[str, Report]) -> list[Section]:
    columns = _columns(members, "stability-by-tokens")
    if not columns:
        return []
    curves = {name: (table["tokens"], table["jaccard_median"]) for name, table in columns.items()}
    chance = float(np.median(np.concatenate([table["chance"] for table in columns.values()])))
    halves = _numbers(members, "stability", "halves_jaccard_median")
    return [
        Section(
            key="stability",
            title="Stability of the supernodes",
            text=(
                "Jaccard index of the supernodes of two disjoint parts of one atlas's text, the largest parts, median FFN: "
                f"{_said(halves, percent)}. {paper.DOMAINS}",
            ),
            numbers={f"{name}: halves_jaccard_median": value for name, value in halves.items()},
            plots=(
                Plot(
                    "stability",
                    "Jaccard index of the supernodes of two disjoint parts of the text against the tokens in a part, median FFN of "
                    "each atlas; grey: by chance.",
                    ("stability-by-tokens",),
                    (lambda axes: draw_agreement(axes, curves, chance),),
                    legend_below=True,
                ),
            ),
            tables=(_together("stability-by-tokens", columns),),
            missing=tuple(f"{name} holds no sums of several splits" for name in members if name not in columns),
        )
    ]


def _overlap(atlases: Sequence[Atlas], names: Sequence[str]) -> Section:
    rows = {
        (first, second): compare(atlases[first], atlases[second])
        for first in range(len(atlases))
        for second in range(len(atlases))
        if first < second
    }
    found = {pair: medians(some) for pair, some in rows.items()}
    matrix = np.eye(len(atlases))
    for (first, second), numbers in found.items():
        matrix[first, second] = matrix[second, first] = numbers["supernode_jaccard"]
    lines = {
        f"{names[second]} with {names[0]}": (
            np.arange(len(some)),
            np.array([row.supernode_jaccard for row in some]),
        )
        for (first, second), some in rows.items()
        if first == 0
    }
    chance = float(np.median([numbers["supernode_chance"] for numbers in found.values()]))
    table = Table(
        "pairs",
        {
            "first": np.array([names[first] for first, _ in found]),
            "second": np.array([names[second] for _, second in found]),
            **{
                key: np.array([numbers[key] for numbers in found.values()])
                for key in ("correlation", "supernode_jaccard", "supernode_chance", "halo_jaccard", "halo_chance")
            },
        },
    )
    depth = Table(
        "pairs-by-depth",
        {
            "atlas": np.repeat(list(lines), [len(values) for _, values in lines.values()]),
            "ffn": np.concatenate([places for places, _ in lines.values()]),
            "supernode_jaccard": np.concatenate([values for _, values in lines.values()]),
        },
    )
    lowest = min(found, key=lambda pair: np.nan_to_num(found[pair]["supernode_jaccard"]))
    return Section(
        key="overlap",
        title="Overlap of the supernodes",
        text=(
            f"{names[lowest[0]]} and {names[lowest[1]]} share the fewest supernodes: their sets have a Jaccard index of "
            f"{significant(found[lowest]['supernode_jaccard'], 3)} in the median FFN ({significant(chance, 2)} by chance).",
        ),
        numbers={
            f"{names[first]}, {names[second]}: supernode_jaccard_median": numbers["supernode_jaccard"]
            for (first, second), numbers in found.items()
        },
        plots=(
            Plot(
                "overlap",
                "Left: Jaccard index of the supernodes of each pair of atlases, median FFN. Right: the same index with the first "
                "atlas, by depth; grey: by chance.",
                ("pairs", "pairs-by-depth"),
                (lambda axes: draw_matrix(axes, matrix, names), lambda axes: draw_with_first(axes, lines, chance)),
                (7.0, 3.6),
                legend_below=True,
            ),
        ),
        tables=(table, depth),
    )


def draw_factors(axes: Any, shares: Mapping[str, np.ndarray]) -> None:
    """Draw the share of each metric of `factors.NAMES` in its own top 1% into matplotlib ``axes``.

    Args:
        shares: Name of the atlas to the shares, (metric,); NaN if the atlas does not hold a metric.
    """
    places = np.arange(len(factors.NAMES))
    for number, (name, values) in enumerate(shares.items()):
        axes.plot(places, values, label=name, **drawing.line_style(number))
    axes.plot(places, list(paper.FACTORS.values()), color="#000000", marker="*", markersize=8, linestyle="", label=drawing.PAPER)
    axes.set_xticks(places, [name.replace(", ", "\n") for name in factors.NAMES.values()])
    axes.set_ylabel("share of the top 1%")
    drawing.share_axis(axes)


def draw_correlation(axes: Any, lines: drawing.Lines) -> None:
    """Draw Spearman's correlation of LP and activation power into matplotlib ``axes``, by depth, a line for each atlas."""
    relative = drawing.lines_by_depth(axes, lines)
    axes.axhline(
        paper.SPEARMAN["activation_power"], color=drawing.GREY, linestyle=(0, (1, 2)), linewidth=1.1, label=drawing.PAPER
    )
    axes.axhline(0, color=drawing.GREY, linewidth=0.8)
    axes.set_ylim(-1, 1)
    axes.set_ylabel("Spearman's correlation")
    drawing.depth_axis(axes, relative=relative)


def draw_overlap(axes: Any, power: Mapping[str, tuple[np.ndarray, ...]]) -> None:
    """Draw the Jaccard index of top sets by LP and by activation power into matplotlib ``axes``, against the sets' size.

    Args:
        power: Name of the atlas to the sizes as shares of the channels, the indices and the indices of random sets, (size,).
    """
    for number, (name, (sizes, jaccard, chance)) in enumerate(power.items()):
        order = np.unique(sizes, return_index=True)[1]
        axes.plot(sizes[order], jaccard[order], label=name, **drawing.line_style(number))
        axes.plot(
            sizes[order],
            chance[order],
            color=drawing.GREY,
            linestyle=":",
            linewidth=0.8,
            label=None if number else "by chance",
        )
    drawing.paper_point(axes, 0.01, paper.ACTIVATION_JACCARD)
    axes.set_xscale("log")
    drawing.percent_ticks(axes)
    axes.set_xlabel("size of the sets, share of the channels")
    axes.set_ylabel("Jaccard with the top by LP")
    drawing.share_axis(axes)


def draw_ratio(axes: Any, lines: drawing.Lines, label: str) -> None:
    """Draw ratios, such as the halo's redundancy over that of other channels, into matplotlib ``axes``, by depth."""
    relative = drawing.lines_by_depth(axes, {name: (x, np.where(np.isfinite(y), y, np.nan)) for name, (x, y) in lines.items()})
    axes.axhline(1, color=drawing.GREY, linestyle=":", label="as redundant")
    drawing.log_axis(axes, np.concatenate([values for _, values in lines.values()]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.set_ylabel(label)
    drawing.depth_axis(axes, relative=relative)


def draw_agreement(axes: Any, curves: drawing.Lines, chance: float) -> None:
    """Draw the Jaccard index of the supernodes of disjoint parts of the text into matplotlib ``axes``.

    Args:
        curves: Name of the atlas to the tokens in a part and the index, (size,).
        chance: Index of random sets.
    """
    for number, (name, (tokens, jaccard)) in enumerate(curves.items()):
        axes.plot(tokens, jaccard, label=name, **drawing.line_style(number))
    axes.axhline(chance, color=drawing.GREY, linestyle=":", label="by chance")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:,.0f}" if f"{value:e}"[0] in "25" else "")
    axes.set_ylim(0, 1)
    axes.set_xlabel("tokens in each part")
    axes.set_ylabel("Jaccard index of the supernodes")


def draw_matrix(axes: Any, values: np.ndarray, names: Sequence[str]) -> None:
    """Draw a number in [0, 1] for every pair of atlases into matplotlib ``axes``: ``values`` (atlas, atlas), with ``names``."""
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues")
    places = range(len(names))
    axes.set_xticks(places, names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(places, names)
    for row in places:
        for column in places:
            value = values[row, column]
            if np.isfinite(value):
                axes.text(
                    column,
                    row,
                    f"{value:.2g}",
                    ha="center",
                    va="center",
                    color="#ffffff" if value > 0.6 else "#000000",
                    fontsize=8,
                )
    axes.set_title("Jaccard of the supernodes")


def draw_with_first(axes: Any, lines: drawing.Lines, chance: float) -> None:
    """Draw the Jaccard index of the supernodes with the first atlas into matplotlib ``axes``, by depth."""
    # The first atlas has no line here, and the others keep the colours of the other figures.
    drawing.lines_by_depth(axes, lines, [drawing.COLOURS[number % len(drawing.COLOURS)] for number in range(1, 1 + len(lines))])
    axes.axhline(chance, color=drawing.GREY, linestyle=":", label="by chance")
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("Jaccard index of the supernodes")
    drawing.depth_axis(axes)
