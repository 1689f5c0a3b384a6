"""Scores of experts that few tokens reached, against true scores that a simulation knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from chanfmt.format.reader import Atlas
from surgery.planning.coverage import Believed, believed, evidence
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from surgery.result.record import plan_json, summary_rows
from tests.support.factory import moe_atlas

if TYPE_CHECKING:
    from pathlib import Path

CHANNELS = 400


def simulated(tokens: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True mean squares of (u s), the means over so many tokens of each expert, and norms that tell something of the true ones."""
    random = np.random.default_rng(seed)
    norms = np.exp(random.normal(0, 0.5, (len(tokens), CHANNELS)))
    true = 1e-7 * norms * np.exp(random.normal(0, 0.8, norms.shape))
    measured = np.stack(
        [
            row * np.square(random.normal(size=(count, CHANNELS)) * random.normal(size=(count, CHANNELS))).mean(axis=0)
            if count
            else np.full(CHANNELS, np.nan)
            for row, count in zip(true, tokens, strict=True)
        ]
    )
    return true, measured, norms


def kept_rightly(scores: np.ndarray, true: np.ndarray) -> float:
    """Share of the true upper half that the upper half by ``scores`` holds."""
    best, found = (set(np.argsort(-values)[: CHANNELS // 2].tolist()) for values in (true, scores))
    return len(best & found) / len(best)


def test_few_tokens_and_norms_together_find_more_than_either() -> None:
    tokens = (4, 12, 2000, 1500)
    for seed in range(3):
        true, measured, norms = simulated(tokens, seed)
        found = believed(measured, norms, np.array(tokens))
        right = [kept_rightly(found.values[expert], true[expert]) for expert in range(4)]
        assert right[0] > max(kept_rightly(measured[0], true[0]), kept_rightly(norms[0], true[0]))
        assert right[1] > kept_rightly(measured[1], true[1]) - 0.02
        # Many tokens speak for themselves.
        for expert in (2, 3):
            assert kept_rightly(found.values[expert], measured[expert]) > 0.98
        assert 8 / 0.8**2 / 1.3 < found.half < 8 / 0.8**2 * 1.3


def test_an_expert_without_tokens_is_at_the_level_of_its_layer() -> None:
    true, measured, norms = simulated((0, 2000, 1500))
    found = believed(measured, norms, np.array([0, 2000, 1500])).values
    np.testing.assert_allclose(found[0] / norms[0], found[0, 0] / norms[0, 0], rtol=1e-12)
    assert 0.8 < np.exp(np.log(found[0]).mean() - np.log(true[0]).mean()) < 1.25


def test_the_unit_of_a_score_and_that_of_a_norm_do_not_matter() -> None:
    _, measured, norms = simulated((5, 900))
    tokens = np.array([5, 900])
    one, other = believed(measured, norms, tokens), believed(measured * 1e-30, norms * 1e9, tokens)
    assert one.half == pytest.approx(other.half)
    np.testing.assert_allclose(other.values, one.values * 1e-30, rtol=1e-9)


def test_zeros_are_no_proof_after_a_few_tokens() -> None:
    _, measured, norms = simulated((3, 2000))
    measured[0, 7], norms[0, 7] = 0.0, 50.0
    measured[1, 9] = 0.0
    found = believed(measured, norms, np.array([3, 2000])).values
    assert found[0, 7] > np.median(found[0])
    assert found[1, 9] <= found[1].min()


def test_scores_that_chance_explains_leave_the_ranking_to_the_norms() -> None:
    norms = np.ones((2, 6)) * np.arange(1, 7)
    found = believed(norms * 3.0, norms, np.array([2, 3]))
    assert found.half == np.inf
    np.testing.assert_allclose(found.values, 3.0 * norms)


def test_without_any_positive_score_nothing_changes() -> None:
    found = believed(np.zeros((2, 3)), np.ones((2, 3)), np.array([5, 0]))
    assert isinstance(found, Believed)
    np.testing.assert_array_equal(found.values, [[0, 0, 0], [1, 1, 1]])
    assert evidence([]) is None


def test_a_plan_says_how_many_experts_lack_tokens_and_what_they_keep(tmp_path: Path) -> None:
    with Atlas.open(moe_atlas(tmp_path / "a.h5")) as atlas:
        plan = make_plan(atlas, PlanOptions(0.5, multiple_of=1))
        counted = plan_json(plan)["experts"]
        assert (counted["experts"], counted["unseen"], counted["few"], counted["kept"]) == (12, 1, 1, (0.5, 0.5))
        [[_, text]] = [row for row in summary_rows(plan) if row[0] == "experts"]
        assert text.startswith("1 of 12 got fewer tokens than their scores need (")
        assert text.endswith(
            "1 of them none: the norms of their weights rank them more; they keep 0.5 of their channels, as their layers do"
        )
        assert make_plan(atlas, PlanOptions(0.5, "magnitude")).evidence is None
