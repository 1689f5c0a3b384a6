"""``atlas trajectory``: how the loss proxy concentrates over checkpoints of one model, and on which channels."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra.compare import check_same_ffns, compare
from chanfmt.analysis.mass import concentration
from chanfmt.analysis.resample import Middle, middle
from chanfmt.base.errors import UsageError
from chanfmt.base.narrate import counted
from chanfmt.base.text import one_line, significant
from chanfmt.reporting import drawing
from chanfmt.reporting.make import Report
from chanfmt.reporting.section import NOT_COMPARABLE, Claim, Plot, Section, Table, above
from chanfmt.reporting.units import find_units, name_columns
from chanfmt.reporting.words import percent, times

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.format.reader import Atlas

RHO = 0.01
LINES = 64
"""Number of FFNs that are drawn one by one."""
_STEP = re.compile(r"(?:step|checkpoint|iter)\D{0,2}(\d+)", re.IGNORECASE)
PAPER = "1B 18.6%; 9B 26%; 84B 60%; 416B 65%; 3.8T 63%; at the end 71.7% (OLMo-2-7B, tokens of pretraining)"


def steps_of(atlases: Sequence[Atlas]) -> list[int] | None:
    """Training steps, as revisions, model names or file names give them (``step1000``, ``checkpoint-20``).

    The first of the three that has a step for every atlas, in ascending order of the files, is used. None if none has.
    """
    for names in (
        [atlas.model.revision for atlas in atlases],
        [atlas.model.id.rpartition("/")[2] for atlas in atlases],
        [atlas.path.stem for atlas in atlases],
    ):
        found = [int(match[1]) for match in map(_STEP.search, names) if match]
        if len(found) == len(atlases) and found == sorted(set(found)):
            return found
    return None


def make_trajectory(atlases: Sequence[Atlas], names: Sequence[str]) -> Report:
    """Make the report of ``atlases`` of one architecture, in order of training.

    Args:
        names: Name of each checkpoint in the report.

    Raises:
        UsageError: Fewer than two atlases.
        AtlasError: The models have different FFNs, or an atlas holds no measured LP.
    """
    if len(atlases) < 2:
        raise UsageError("a trajectory needs two atlases or more", hint="name the atlases in order of training")
    for atlas in atlases[:-1]:
        check_same_ffns(atlas, atlases[-1])
    steps = steps_of(atlases)
    x = np.array(steps if steps else range(1, len(atlases) + 1))
    rows: list[dict[str, Any]] = []
    tables = []
    # A file may have a name that no encoding has.
    names = [one_line(name) for name in names]
    for atlas, name, place in zip(counted(atlases, "atlas", "trajectory"), names, x, strict=True):
        units, _ = find_units(atlas)
        found = [concentration(unit.known("lp"), RHO) for unit in units]
        numbers = {
            key: np.array([getattr(item, key) for item in found])
            for key in ("mass", "top_share", "max_over_mean", "effective_channels", "gini")
        }
        depth = np.array([unit.index for unit in units])
        against = {kind: compare(atlas, other) for kind, other in (("last", atlases[-1]), ("first", atlases[0]))}
        rows.append(
            {
                "checkpoint": name,
                "step": int(place),
                "mean_loss": atlas.calibration.mean_loss,
                **{key: middle(values, depth) for key, values in numbers.items()},
                **{
                    f"{kind}_{key}": middle(np.array([getattr(item, key) for item in items]))
                    for kind, items in against.items()
                    for key in ("supernode_jaccard", "correlation", "supernode_chance")
                },
            }
        )
        tables.append({"step": np.full(len(units), place), **name_columns(units), **numbers})
    same = len({atlases[place].model.fingerprint for place in (0, -1)}) == 1
    rise = middle(*_rise(tables[0], tables[-1]))
    per_ffn = Table("by-ffn", {key: np.concatenate([table[key] for table in tables]) for key in tables[0]})
    return Report(
        title=f"Trajectory of {one_line(atlases[-1].model.id)}",
        facts={
            "checkpoints": f"{len(atlases)}: {', '.join(names)}",
            "axis": "training steps, from the names" if steps else "the given order",
            "FFNs": f"{len(atlases[-1].blocks):,}",
            "calibration": f"{atlases[-1].calibration.sequences:,} x {atlases[-1].calibration.seq_len:,} tokens",
        },
        notes=tuple(_notes(atlases)),
        sections=(
            _concentration(x, rows, per_ffn, None if same else rise, named=bool(steps)),
            _overlap(x, rows, named=bool(steps)),
        ),
    )


def _notes(atlases: Sequence[Atlas]) -> list[str]:
    notes = []
    if len({atlas.calibration.sequence_sha256 for atlas in atlases}) > 1:
        notes.append("The checkpoints were not measured on the same tokens, so some of the changes come from the text.")
    last = atlases[-1].calibration
    other = next((atlas.calibration for atlas in atlases if not atlas.calibration.begins_like(last)), None)
    if other is not None:
        notes.append(f"The sequences of one checkpoint {other.ends}, and those of the last one {last.ends}.")
    if len({atlas.labels.rho for atlas in atlases}) > 1:
        notes.append("The atlases were labelled with different rho.")
    if any(atlas.status != "complete" for atlas in atlases):
        notes.append("The build of one checkpoint's atlas is unfinished, and its numbers will change.")
    prints = [atlas.model.fingerprint for atlas in atlases]
    if len(set(prints)) < len(prints):
        notes.append("Two checkpoints have the same weights.")
    return notes


def _table(name: str, x: np.ndarray, rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> Table:
    columns: dict[str, np.ndarray] = {
        "checkpoint": np.array([row["checkpoint"] for row in rows]),
        "step": x,
        "mean_loss": np.array([row["mean_loss"] for row in rows], dtype=np.float64),
    }
    for key in keys:
        for field, suffix in (("median", "median"), ("low", "low"), ("high", "high")):
            columns[f"{key}_{suffix}"] = np.array([getattr(row[key], field) for row in rows])
    return Table(name, columns)


def _rise(first: dict[str, np.ndarray], last: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rise of the top 1% share of every unit that both tables hold, (n,), and the number of its FFN, (n,)."""
    places, shares = [], []
    for table in (first, last):
        experts = table.get("expert", np.full(len(table["ffn"]), -1))
        places.append(list(zip(table["ffn"].tolist(), experts.tolist(), strict=True)))
        shares.append(dict(zip(places[-1], table["top_share"].tolist(), strict=True)))
    both = [place for place in places[0] if place in shares[1]]
    return np.array([shares[1][place] - shares[0][place] for place in both]), np.array([ffn for ffn, _ in both])


def _concentration(x: np.ndarray, rows: Sequence[dict[str, Any]], per_ffn: Table, rise: Middle | None, *, named: bool) -> Section:
    """Make the section about concentration.

    Args:
        rise: Rise of the top 1% share within an FFN from the first to the last checkpoint; None if these two checkpoints have
            the same weights.
    """
    shares: list[Middle] = [row["top_share"] for row in rows]
    first, last = shares[0], shares[-1]
    peaks = [times(row["max_over_mean"].median) for row in rows]
    changes = np.sign(np.diff([share.median for share in shares]))
    ways = f"rises {int((changes > 0).sum())} times and falls {int((changes < 0).sum())} times"
    within = ""
    if rise is not None and np.isfinite(rise.low):
        within = f" (within an FFN {100 * rise.median:+.1f} points, interval {100 * rise.low:+.1f} to {100 * rise.high:+.1f})"
    claims = (
        Claim(
            "LP concentrates during training",
            PAPER,
            f"{percent(first.median)} at first, {percent(last.median)} at last{within}",
            NOT_COMPARABLE if rise is None else above(rise, 0.0),
            "the top 1% share within an FFN rises from the first checkpoint to the last, in the median and its interval",
        ),
    )
    return Section(
        key="concentration",
        title="Concentration over training",
        text=(
            f"The median FFN's top 1% hold {percent(first.median)} of its LP at the first checkpoint and {percent(last.median)} "
            f"at the last{within}; the largest channel has {peaks[0]} and {peaks[-1]} times the mean. From one checkpoint to the "
            f"next the median share {ways}.",
        ),
        numbers={
            "first_top_share_median": first.median,
            "last_top_share_median": last.median,
            **({} if rise is None else {"rise_median": rise.median, "rise_low": rise.low, "rise_high": rise.high}),
            "first_max_over_mean_median": rows[0]["max_over_mean"].median,
            "last_max_over_mean_median": rows[-1]["max_over_mean"].median,
            "first_mean_loss": rows[0]["mean_loss"],
            "last_mean_loss": rows[-1]["mean_loss"],
        },
        plots=(
            Plot(
                "concentration",
                "Left: share of the LP mass in the top 1% of the channels, median FFN with its bootstrap interval; thin lines: "
                f"single FFNs (at most {LINES}, spread over the depth). Right: the largest channel over the mean.",
                ("concentration", "by-ffn"),
                (
                    lambda axes: draw_top_share(axes, x, rows, per_ffn, named=named),
                    lambda axes: draw_largest(axes, x, rows, per_ffn, named=named),
                ),
                claims=claims,
            ),
        ),
        tables=(_table("concentration", x, rows, ("top_share", "max_over_mean", "effective_channels", "gini")), per_ffn),
        claims=claims,
    )


def _overlap(x: np.ndarray, rows: Sequence[dict[str, Any]], *, named: bool) -> Section:
    before = [row["last_supernode_jaccard"].median for row in rows[:-1]]
    chance = rows[-1]["last_supernode_chance"].median
    return Section(
        key="overlap",
        title="When the final supernodes appear",
        text=(
            f"The supernodes of the first and the last checkpoint have a Jaccard index of {significant(before[0], 3)} in the median "
            f"FFN ({significant(chance, 2)} by chance). For the last two checkpoints, it is {significant(before[-1], 3)}.",
        ),
        numbers={
            "first_with_last_jaccard_median": before[0],
            "last_but_one_with_last_jaccard_median": before[-1],
            "jaccard_chance": chance,
            "first_with_last_correlation_median": rows[0]["last_correlation"].median,
        },
        plots=(
            Plot(
                "overlap",
                "Left: Jaccard index of each checkpoint's supernodes with the supernodes of the last and of the first checkpoint, "
                "median FFN. Right: Spearman's correlation of LP over all channels, with the same two checkpoints. Grey: by "
                "chance.",
                ("overlap",),
                (
                    lambda axes: draw_supernodes(axes, x, rows, chance, named=named),
                    lambda axes: draw_ranks(axes, x, rows, named=named),
                ),
            ),
        ),
        tables=(
            _table(
                "overlap",
                x,
                rows,
                tuple(f"{kind}_{key}" for kind in ("last", "first") for key in ("supernode_jaccard", "correlation")),
            ),
        ),
    )


def _axis(axes: Any, x: np.ndarray, *, named: bool) -> None:
    axes.set_xlabel("training steps" if named else "checkpoint")
    # Checkpoints are often kept at powers of two.
    if named and len(x) > 3 and x.min() > 0 and x.max() / x.min() > 20:
        axes.set_xscale("log")
    if not named or len(x) <= 10:
        axes.set_xticks(x, [f"{place:g}" for place in x])
        axes.minorticks_off()


def draw_top_share(axes: Any, x: np.ndarray, rows: Sequence[dict[str, Any]], per_ffn: Table, *, named: bool) -> None:
    """Draw the share of LP in the top 1% of the channels into matplotlib ``axes``, over checkpoints.

    Args:
        x: Place of each checkpoint on the horizontal axis, (checkpoint,).
        rows: One dictionary per checkpoint, with a `Middle` under ``top_share``.
        per_ffn: One row per unit and checkpoint: ``step``, ``ffn``, perhaps ``expert``, and ``top_share``.
        named: Whether ``x`` are training steps.
    """
    _draw_units(axes, x, rows, per_ffn, "top_share", 0)
    _axis(axes, x, named=named)
    drawing.share_axis(axes)
    axes.set_title("share of LP in the top 1%")


def draw_largest(axes: Any, x: np.ndarray, rows: Sequence[dict[str, Any]], per_ffn: Table, *, named: bool) -> None:
    """Draw the largest LP over the mean, ``max_over_mean``, with the arguments of `draw_top_share`."""
    _draw_units(axes, x, rows, per_ffn, "max_over_mean", 1)
    _axis(axes, x, named=named)
    drawing.log_axis(axes, per_ffn.columns["max_over_mean"])
    axes.set_title("largest LP over the mean")


def draw_supernodes(axes: Any, x: np.ndarray, rows: Sequence[dict[str, Any]], chance: float, *, named: bool) -> None:
    """Draw the Jaccard index of each checkpoint's supernodes with the last and the first one's into matplotlib ``axes``.

    Args:
        x, named: As for `draw_top_share`.
        rows: One dictionary per checkpoint, with a `Middle` under ``last_supernode_jaccard`` and ``first_supernode_jaccard``.
        chance: Index of random sets.
    """
    _draw_both(axes, x, rows, "supernode_jaccard")
    _axis(axes, x, named=named)
    axes.axhline(chance, color=drawing.GREY, linestyle=":", label="by chance")
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("Jaccard index of the supernodes")
    drawing.legend(axes)


def draw_ranks(axes: Any, x: np.ndarray, rows: Sequence[dict[str, Any]], *, named: bool) -> None:
    """Draw Spearman's correlation of each checkpoint's LP with the last and the first one's into matplotlib ``axes``.

    Args:
        x, named: As for `draw_top_share`.
        rows: One dictionary per checkpoint, with a `Middle` under ``last_correlation`` and ``first_correlation``.
    """
    _draw_both(axes, x, rows, "correlation")
    _axis(axes, x, named=named)
    axes.axhline(0, color=drawing.GREY, linestyle=":")
    axes.set_ylabel("Spearman's correlation of LP")


def _draw_units(axes: Any, x: np.ndarray, rows: Sequence[dict[str, Any]], per_ffn: Table, key: str, number: int) -> None:
    """Thin lines of single units, and the medians with their intervals."""
    columns = per_ffn.columns
    units = np.stack([columns["ffn"], columns.get("expert", np.zeros(len(columns["ffn"])))], axis=1)
    found_units = np.unique(units, axis=0)
    for unit in found_units[np.unique(np.linspace(0, len(found_units) - 1, LINES).astype(int))]:
        mine = (units == unit).all(axis=1)
        axes.plot(columns["step"][mine], columns[key][mine], color=drawing.GREY, linewidth=0.4, alpha=0.6)
    found: list[Middle] = [row[key] for row in rows]
    medians = np.array([item.median for item in found])
    low, high = (np.array([getattr(item, name) for item in found]) for name in ("low", "high"))
    errors = np.nan_to_num(np.abs(np.stack([medians - low, high - medians])))
    axes.errorbar(x, medians, yerr=errors, capsize=2, **drawing.line_style(number))


def _draw_both(axes: Any, x: np.ndarray, rows: Sequence[dict[str, Any]], key: str) -> None:
    for number, kind in enumerate(("last", "first")):
        axes.plot(x, [row[f"{kind}_{key}"].median for row in rows], label=f"with the {kind}", **drawing.line_style(number))
