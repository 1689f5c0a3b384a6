"""Every statistic of a report against an independent computation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy import stats

import chanfmt
from chanfmt.algebra.columns import with_columns
from chanfmt.algebra.compare import rank_correlation
from chanfmt.analysis.association import top_overlap
from chanfmt.analysis.halo import halo_redundancy
from chanfmt.analysis.mass import concentration
from chanfmt.analysis.resample import Middle, middle
from chanfmt.analysis.splits import stability
from chanfmt.format import schema
from chanfmt.format.columns import REDUNDANCY_CHANCE
from chanfmt.format.writer import write_atlas
from chanfmt.reporting.section import above, below, worst
from chanfmt.reporting.sections import concentrated, controls, factors, halo, measured, reading, stable
from chanfmt.reporting.units import find_units
from tests.support.factory import random_atlas, random_content

if TYPE_CHECKING:
    from pathlib import Path

RNG = np.random.default_rng(7)


def jaccard(first: set[int], second: set[int]) -> float:
    return len(first & second) / len(first | second)


def top(values: np.ndarray, size: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda channel: (-values[channel], channel))[:size])


def test_concentration_against_definitions() -> None:
    values = np.exp(RNG.normal(size=700))
    found = concentration(values, 0.01)
    assert found.top_share == pytest.approx(sorted(values)[-7:] @ np.ones(7) / values.sum())
    assert found.effective_channels == pytest.approx(values.sum() ** 2 / np.square(values).sum())
    pairs = np.abs(values[:, None] - values[None]).mean()
    assert found.gini == pytest.approx(pairs / (2 * values.mean()))


def test_overlap_and_chance_against_sampling() -> None:
    first, second = RNG.permutation(400.0 + np.arange(400)), RNG.permutation(np.arange(400.0))
    first[3], second[9] = np.nan, np.nan
    found = top_overlap(first, second, 0.05)
    known = np.isfinite(first) & np.isfinite(second)
    a, b = top(first[known], 19), top(second[known], 19)
    assert (found.size, found.shared, found.jaccard) == (19, len(a & b), pytest.approx(jaccard(a, b)))
    drawn = [jaccard(set(RNG.choice(398, 19, replace=False)), set(RNG.choice(398, 19, replace=False))) for _ in range(4000)]
    assert found.chance == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / np.sqrt(4000))


def test_median_interval_against_scipy() -> None:
    values = np.append(RNG.gamma(2.0, size=41), np.nan)
    found = middle(values)
    known = values[:-1]
    theirs = stats.bootstrap((known,), np.median, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert (found.count, found.median, found.smallest, found.largest) == (41, np.median(known), known.min(), known.max())
    spread = theirs.high - theirs.low
    assert found.low == pytest.approx(theirs.low, abs=0.1 * spread)
    assert found.high == pytest.approx(theirs.high, abs=0.1 * spread)
    assert middle(np.array([np.nan])).count == 0
    assert np.isnan(middle(np.array([1.0])).low)


def test_the_interval_draws_whole_clusters() -> None:
    clusters = np.repeat(np.arange(9), RNG.integers(1, 6, 9))
    values = RNG.normal(size=len(clusters)) + 5 * RNG.normal(size=9)[clusters]
    values[3] = np.nan
    found = middle(values, clusters)
    members = [values[(clusters == cluster) & np.isfinite(values)] for cluster in range(9)]
    members = [row for row in members if len(row)]
    medians = [
        np.median(np.concatenate([members[one] for one in RNG.integers(0, len(members), len(members))])) for _ in range(4000)
    ]
    low, high = np.quantile(medians, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.1 * (high - low))
    assert found.high == pytest.approx(high, abs=0.1 * (high - low))
    assert found.median == np.nanmedian(values)
    assert np.isnan(middle(np.array([1.0, 2.0]), np.array([4, 4])).low)


@pytest.mark.parametrize(
    ("low", "high", "over", "under"),
    [
        (1.5, 2.0, "agrees", "differs"),
        (0.2, 0.9, "differs", "agrees"),
        (0.5, 1.5, "undecided", "undecided"),
        (np.nan, np.nan, "not comparable", "not comparable"),
    ],
)
def test_verdicts_by_intervals(low: float, high: float, over: str, under: str) -> None:
    found = Middle(5, 1.0, low, high, 0.0, 2.0)
    assert (above(found, 1.0), below(found, 1.0)) == (over, under)


def test_several_are_judged_by_the_worst() -> None:
    assert worst(["agrees", "undecided"]) == "undecided"
    assert worst(["undecided", "differs", "agrees"]) == "differs"
    assert worst([]) == "not comparable"


def test_stability_against_loops_and_scipy() -> None:
    sums = RNG.gamma(0.5, size=(8, 300)) * np.exp(RNG.normal(0, 1.5, size=300))
    tokens = np.full(8, 512)
    found = stability(sums, tokens, 0.02, replicates=4000)
    assert found is not None
    whole = top(sums.sum(axis=0), 6)
    left = [top(np.delete(sums, split, axis=0).sum(axis=0), 6) for split in range(8)]
    assert found.leave_one_out == pytest.approx(np.mean([jaccard(whole, other) for other in left]))

    def share(index: np.ndarray) -> float:
        rows = np.sort(sums[index].sum(axis=0))
        return float(rows[-6:].sum() / rows.sum())

    shares = np.array([share(np.delete(np.arange(8), split)) for split in range(8)])
    assert found.top_share == pytest.approx(share(np.arange(8)))
    assert found.top_share_error == pytest.approx(np.sqrt(7 / 8 * ((shares - shares.mean()) ** 2).sum()))
    theirs = stats.bootstrap((np.arange(8),), share, n_resamples=4000, method="percentile", vectorized=False, rng=1)
    spread = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert found.top_share_low == pytest.approx(theirs.confidence_interval.low, abs=0.1 * spread)
    assert found.top_share_high == pytest.approx(theirs.confidence_interval.high, abs=0.1 * spread)
    remained = np.zeros(300)
    for _ in range(2000):
        remained[list(top(sums[RNG.integers(0, 8, 8)].sum(axis=0), 6))] += 1
    assert found.persistence == pytest.approx(remained[list(whole)].mean() / 2000, abs=0.03)
    for agreement, part in zip(found.by_tokens, (1, 2, 4), strict=True):
        tops = [top(sums[start : start + part].sum(axis=0), 6) for start in range(0, 8, part)]
        pairs = [jaccard(a, b) for place, a in enumerate(tops) for b in tops[place + 1 :]]
        assert (agreement.tokens, agreement.pairs) == (512 * part, len(pairs))
        assert agreement.jaccard == pytest.approx(np.mean(pairs))


def test_stability_of_nothing() -> None:
    assert stability(np.ones((1, 5)), np.array([3]), 0.01) is None
    assert stability(np.ones((3, 5)), np.array([3, 0, 0]), 0.01) is None
    assert stability(np.zeros((3, 5)), np.array([3, 3, 3]), 0.01) is None
    assert stability(np.full((3, 5), np.nan), np.array([3, 3, 3]), 0.01) is None


def test_halo_is_matched_in_lp() -> None:
    lp = np.exp(RNG.normal(size=200))
    labels = np.zeros(200, dtype=np.uint8)
    labels[np.argsort(-lp)[:2]] = schema.LABEL_SUPERNODE
    halo_channels = RNG.choice(np.flatnonzero(labels == 0), 20, replace=False)
    labels[halo_channels] = schema.LABEL_HALO
    redundancy = 0.1 * lp  # LP alone explains it, so that the matched control leaves no difference.
    redundancy[labels == schema.LABEL_SUPERNODE] = np.nan
    found = halo_redundancy(lp, labels, redundancy, redundancy / 10, redundancy / 20)
    assert found is not None
    assert found.channels == 20
    assert found.halo == pytest.approx(redundancy[halo_channels].mean())
    assert found.others == pytest.approx(redundancy[labels == 0].mean())
    assert found.matched == pytest.approx(found.halo, rel=0.1)
    assert found.halo_null == pytest.approx(found.halo / 10)
    assert found.halo_chance == pytest.approx(found.halo / 20)
    assert found.others_chance == pytest.approx(found.others / 20)
    assert halo_redundancy(lp, np.zeros(200, np.uint8), redundancy, None) is None


def test_the_report_uses_the_null_of_chance_if_the_atlas_has_it(tmp_path: Path) -> None:
    content = random_content(layers=5, channels=200)
    null = content.stacks[0].variables["redundancy_null"]
    write_atlas(with_columns(content, {REDUNDANCY_CHANCE: {"decoder": null / 2}}), tmp_path / "a.h5")
    sections = []
    for path in (tmp_path / "a.h5", random_atlas(tmp_path / "b.h5", layers=5, channels=200)):
        with chanfmt.open(path) as atlas:
            sections.append(halo.make(find_units(atlas)[0], 512))
    ours, older = sections
    table = ours.tables[0].columns
    np.testing.assert_allclose(table["over_chance"], 2 * older.tables[0].columns["over_null"], rtol=1e-6)
    np.testing.assert_allclose(
        table["excess_over_matched"],
        (table["halo"] - table["halo_null"] / 2) / (table["matched"] - table["matched_null"] / 2),
        rtol=1e-6,
    )
    assert ours.numbers["halo_null_over_chance_median"] == pytest.approx(2)
    assert "what chance gives" in " ".join(ours.text)
    assert "chance gives" not in " ".join(older.text)
    assert "halo_over_chance_median" not in older.numbers


def test_measured_effects_are_reported_if_the_atlas_has_them(tmp_path: Path) -> None:
    content = random_content(layers=5, channels=200)
    lp, label = (content.stacks[0].variables[name] for name in ("lp", "label"))
    chosen = RNG.random(lp.shape) < 0.1
    loss = np.where(chosen, lp * np.exp(RNG.normal(size=lp.shape)) * RNG.choice([1, -1], lp.shape), np.nan).astype(np.float32)
    error = np.where(chosen, np.abs(loss) / RNG.uniform(1, 4, lp.shape), np.nan).astype(np.float32)
    peers = np.where(label > 0, RNG.random(lp.shape), np.nan).astype(np.float32)
    found = {"ablation_loss": loss, "ablation_loss_error": error, "replaceability": peers}
    write_atlas(
        with_columns(content, {f"x_common/{name}": {"decoder": values} for name, values in found.items()}), tmp_path / "a.h5"
    )
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        report = chanfmt.report(atlas)
        section = report.sections[-1]
    assert section.key == "measured"
    assert section.numbers["ablation_loss_channels"] == chosen.sum()
    assert section.numbers["ablation_loss_above_two_errors"] == (loss > 2 * error).sum()
    assert section.numbers["ablation_loss_sum"] == pytest.approx(np.nansum(loss.astype(np.float64)))
    expected = [stats.spearmanr(np.abs(a[b]), c[b]).statistic for a, b, c in zip(loss, chosen, lp, strict=True)]
    assert section.numbers["ablation_loss_spearman_median"] == pytest.approx(np.median(expected))
    medians = [np.median(row[kind == 2]) for row, kind in zip(peers, label, strict=True)]
    assert section.numbers["replaceability_supernode_median"] == pytest.approx(np.median(medians))
    assert len(section.tables[1].columns["lp"]) == chosen.sum()
    with chanfmt.open(random_atlas(tmp_path / "b.h5", layers=5, channels=200)) as atlas:
        assert measured.make(find_units(atlas)[0], 512) is None


def test_the_sections_hold_the_medians_over_ffns(tmp_path: Path) -> None:
    variables = random_content(layers=5, channels=200).stacks[0].variables
    lp = variables["lp"].astype(np.float64)
    with chanfmt.open(random_atlas(tmp_path / "a.h5", layers=5, channels=200)) as atlas:
        units, without = find_units(atlas)
        assert (len(units), without) == (5, 0)
        numbers = concentrated.make(units, atlas.labels.rho).numbers
        shares = [np.sort(row)[-2:].sum() / row.sum() for row in lp]
        assert numbers["top_share_median"] == pytest.approx(np.median(shares), rel=1e-6)
        assert numbers["max_over_mean_median"] == pytest.approx(np.median(lp.max(axis=1) / lp.mean(axis=1)), rel=1e-6)
        curve = concentrated.make(units, 0.01).tables[1].columns
        at = (curve["layer"] == 3) & np.isclose(curve["fraction"], curve["fraction"][17])
        sums = np.append(0, np.cumsum(np.sort(lp[3])[::-1])) / lp[3].sum()
        expected = np.interp(curve["fraction"][17] * 200, np.arange(201), sums)
        assert curve["share"][at] == pytest.approx(expected)
        found = factors.make(units).numbers
        curvature = variables["curvature"].astype(np.float64)
        assert found["curvature_top_share_median"] == pytest.approx(
            np.median([np.sort(row)[-2:].sum() / row.sum() for row in curvature])
        )
        found = controls.make(units).numbers
        for name in controls.CONTROLS:
            expected = np.median([stats.spearmanr(a, b).statistic for a, b in zip(lp, variables[name], strict=True)])
            assert found[f"spearman_{name}_median"] == pytest.approx(expected)
            expected = np.median([jaccard(top(a, 2), top(b, 2)) for a, b in zip(lp, variables[name], strict=True)])
            assert found[f"jaccard_{name}_at_1_percent"] == pytest.approx(expected)
        section = halo.make(units, 512)
        table, labels = section.tables[0].columns, variables["label"]
        redundancy = variables["redundancy"].astype(np.float64)
        means = [np.nanmean(row[kind == 1]) for row, kind in zip(redundancy, labels, strict=True)]
        np.testing.assert_allclose(table["halo"], means)
        np.testing.assert_allclose(table["over_null"], table["halo"] / table["halo_null"])
        assert section.numbers["halo_over_others_median"] == pytest.approx(np.median(table["halo"] / table["others"]))
        found = reading.make(units, None)
        reads = variables["read_connectivity"]
        rows = [row for row in range(5) if np.isfinite(reads[row]).any()]
        inside = [len(top(reads[row], 20) & set(np.flatnonzero(labels[row] == 2))) / (labels[row] == 2).sum() for row in rows]
        assert found.numbers["supernodes_in_read_halo_median"] == pytest.approx(np.median(inside))
        assert found.numbers["spearman_median"] == pytest.approx(
            np.median([stats.spearmanr(reads[row], lp[row]).statistic for row in rows])
        )
        found = stable.make(units, 0.01, lambda: None)
        halves = []
        for row in range(5):
            first, second = (variables["sum_q2_split"][start : start + 4, row].sum(axis=0) for start in (0, 4))
            halves.append(jaccard(top(first, 2), top(second, 2)))
        assert found.numbers["halves_jaccard_median"] == pytest.approx(np.median(halves))


def test_rank_correlation_is_scipys_with_ties() -> None:
    first, second = RNG.integers(0, 9, 100).astype(float), RNG.integers(0, 9, 100).astype(float)
    assert rank_correlation(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
