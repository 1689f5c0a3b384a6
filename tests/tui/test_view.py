"""Known arrays, known answers: summaries, orders, strips, searches."""

from __future__ import annotations

import numpy as np
import pytest

from chanfmt.analysis import strip
from chanfmt.analysis.mass import concentration
from tui.session import view

NAN = float("nan")


def test_summary_counts_labels_and_leaves_unknown_channels_out() -> None:
    values = np.array([3.0, 1.0, NAN, 0.0], dtype=np.float32)
    summary = view.summarize(values, np.array([2, 1, 1, 0], dtype=np.uint8), 0.01)
    assert (summary.supernodes, summary.halo, summary.known) == (1, 2, 3)
    assert summary.concentration.mass == 4.0
    assert summary.concentration.top_share == 0.75
    assert summary.concentration.effective_channels == pytest.approx(16 / 10)


def test_summary_of_nothing_known_is_nan() -> None:
    summary = view.summarize(np.full(3, NAN), np.zeros(3, dtype=np.uint8), 0.01)
    assert np.isnan(summary.concentration.mass)
    assert summary.known == 0


def test_order_is_stable_and_puts_unknown_last_both_ways() -> None:
    values = np.array([1.0, NAN, 2.0, 1.0], dtype=np.float32)
    assert view.order_by(values, descending=True).tolist() == [2, 0, 3, 1]
    assert view.order_by(values, descending=False).tolist() == [0, 3, 2, 1]


def test_order_of_unsigned_labels() -> None:
    labels = np.array([0, 2, 1, 2], dtype=np.uint8)
    assert view.order_by(labels, descending=True).tolist() == [1, 3, 2, 0]


def test_ranking() -> None:
    ranking = view.ranking(np.array([1.0, 6.0, NAN, 3.0], dtype=np.float32))
    assert ranking.order.tolist() == [1, 3, 0, 2]
    assert ranking.rank.tolist() == [3, 1, 4, 2]
    np.testing.assert_allclose(ranking.share, [0.1, 0.6, NAN, 0.3], rtol=1e-6)
    np.testing.assert_allclose(ranking.cumulative, [1.0, 0.6, NAN, 0.9])
    np.testing.assert_allclose(ranking.curve, [0, 0.6, 0.9, 1.0, 1.0])


def test_ranking_without_mass_has_no_share() -> None:
    ranking = view.ranking(np.zeros(3, dtype=np.float32))
    assert ranking.share.tolist() == [0, 0, 0]
    assert ranking.curve.tolist() == [0, 0, 0, 0]


def test_ranking_agrees_with_the_format() -> None:
    values = np.random.default_rng(0).gamma(0.1, 1.0, 200)
    curve = view.ranking(values).curve
    np.testing.assert_allclose(curve, np.concatenate([[0], np.cumsum(np.sort(values)[::-1])]) / values.sum())
    # The top 1% of 200 channels are two.
    assert curve[2] == pytest.approx(concentration(values).top_share)


@pytest.mark.parametrize("log", [True, False])
def test_bins_cover_every_channel_once(log: bool) -> None:
    edges = strip.bin_edges(14336, 86, log=log)
    assert edges[0] == 0
    assert edges[-1] == pytest.approx(14336)
    values = np.random.default_rng(0).gamma(0.1, 1.0, 14336)
    assert float(strip.strip_shares(values, 86, log=log) @ np.diff(edges)) == pytest.approx(1.0)


def test_strip_by_index_is_the_mean_share_per_channel() -> None:
    assert strip.strip_shares(np.array([1.0, 1.0, 0.0, 6.0]), 2, log=False).tolist() == [0.125, 0.375]


def test_strip_by_rank_starts_with_the_largest_channel_and_falls() -> None:
    shares = strip.strip_shares(np.array([1.0, NAN, 8.0, 1.0]), 40, log=True)
    assert shares[0] == pytest.approx(0.8)
    assert (np.diff(shares) <= 1e-12).all()


def test_more_samples_than_channels() -> None:
    assert strip.strip_shares(np.array([3.0, 1.0]), 4, log=False).tolist() == [0.75, 0.75, 0.25, 0.25]


def test_levels_run_from_nothing_to_the_whole_layer() -> None:
    levels = strip.strip_levels(np.array([0.0, 1e-9, 1e-4, 0.01, 1.0]), 100, 8)
    assert levels.tolist() == [0, 0, 0, 4, 8]


@pytest.mark.parametrize(
    ("query", "expected"),
    [("2", [2]), ("su", [0]), ("halo", [1]), ("none", [2, 3]), ("9", []), ("other", [])],
)
def test_find_channels(query: str, expected: list[int]) -> None:
    labels = np.array([2, 1, 0, 0], dtype=np.uint8)
    assert np.flatnonzero(view.match_channels(labels, query)).tolist() == expected


@pytest.mark.parametrize(("start", "step", "expected"), [(0, 1, 1), (1, 1, 3), (3, 1, 1), (3, -1, 1), (1, -1, 3), (2, -1, 1)])
def test_next_match_goes_round(start: int, step: int, expected: int) -> None:
    assert view.next_match(np.array([False, True, False, True]), start, step) == expected


def test_no_match() -> None:
    assert view.next_match(np.zeros(3, dtype=bool), 0, 1) is None
