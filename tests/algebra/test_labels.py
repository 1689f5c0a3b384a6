"""The paper's definitions against a plain reading of them, loop by loop, with no shared code."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chanfmt.algebra import labels
from chanfmt.analysis.mass import concentration
from chanfmt.format import schema
from chanfmt.format.records import LabelSettings
from tests.support.plain_labels import plain_connectivity, plain_protection, plain_top


def plain_redundancy(q, core, k):
    count, channels = len(q), len(q[0])
    result = []
    for i in range(channels):
        pairs = []
        for s in core:
            if s == i:
                continue
            a, b = [row[i] for row in q], [row[s] for row in q]
            mean_a, mean_b = sum(a) / count, sum(b) / count
            cov = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
            var_a, var_b = sum((x - mean_a) ** 2 for x in a), sum((y - mean_b) ** 2 for y in b)
            r = cov / math.sqrt(var_a) / math.sqrt(var_b) if var_a > 0 and var_b > 0 else 0.0
            pairs.append(-0.5 * math.log(1 - max(r, 0.0) ** 2))
        best = sorted(pairs, reverse=True)[:k]
        result.append(sum(best) / len(best) if best else math.nan)
    return result


@st.composite
def layers(draw):
    seed = draw(st.integers(0, 2**31))
    channels = draw(st.integers(2, 60))
    hidden = draw(st.integers(1, 12))
    random = np.random.default_rng(seed)
    levels = draw(st.sampled_from([3, 1000]))  # three levels: ties everywhere
    lp = random.integers(0, levels, channels) / levels
    write = random.integers(-levels, levels + 1, (hidden, channels)) / levels
    q = random.normal(0, 1, (40, channels)) * np.exp(random.normal(-16, 2, channels))
    q[:, 1] += q[:, 0]
    if draw(st.booleans()):
        dead = draw(st.integers(0, channels - 1))
        q[:, dead], write[:, dead], lp[dead] = 0, 0, 0
    rho = draw(st.sampled_from([0.001, 0.01, 0.05, 0.3, 1.0]))
    eta = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return lp, write, q, rho, eta, draw(st.integers(1, 15))


@settings(max_examples=150, deadline=None)
@given(layers())
def test_one_layer_equals_the_plain_reading(layer):
    lp, write, q, rho, eta, size = layer
    channels = len(lp)
    core = labels.supernodes(lp, rho)
    count = max(1, math.floor(rho * channels))
    assert core.tolist() == plain_top(lp.tolist(), count)
    support, conn = plain_connectivity(write.tolist(), core.tolist(), size)
    assert labels.write_support(write, core, size).tolist() == support
    ladder = labels.support_sizes(len(write), size)
    at = labels.connectivity(write, core, ladder)
    for level, shares in zip(ladder, at, strict=True):
        np.testing.assert_allclose(shares, plain_connectivity(write.tolist(), core.tolist(), level)[1], rtol=1e-12)
    found = at[ladder.index(size)]
    np.testing.assert_allclose(found, conn, rtol=1e-12)
    others = [j for j in range(channels) if j not in set(core.tolist())]
    chosen = [others[i] for i in plain_top([found[j] for j in others], math.floor(eta * len(others)))]
    halo = labels.halo(found, core, eta)
    assert halo.tolist() == chosen
    correlation = labels.pearson(q.T @ q[:, core], q.sum(0), (q**2).sum(0), q[:, core].sum(0), (q[:, core] ** 2).sum(0), len(q))
    redundancy = labels.redundancy_to_core(correlation, core, 5)
    np.testing.assert_allclose(redundancy, plain_redundancy(q.tolist(), core.tolist(), 5), rtol=1e-6, atol=1e-9)
    if not np.isnan(redundancy).any():
        expected = plain_protection(redundancy.tolist(), halo.tolist(), 0.2, 8)
        np.testing.assert_allclose(labels.protection(redundancy, halo, 0.2, 8), expected, rtol=1e-12)
    label, factor = labels.label_ffn(lp, found, redundancy, LabelSettings(rho=rho, eta=eta, support_size=size))
    np.testing.assert_array_equal(factor, labels.protection(redundancy, halo, 0.2, 8).astype(np.float32))
    assert np.flatnonzero(label == schema.LABEL_HALO).tolist() == halo.tolist()
    assert (label == schema.LABEL_SUPERNODE).sum() == count


def test_what_is_unknown_gets_no_label():
    random = np.random.default_rng(0)
    lp, conn, redundancy = random.random(50), random.random(50), random.random(50)
    whole, _ = labels.label_ffn(lp, conn, redundancy, LabelSettings())
    label, factor = labels.label_ffn(lp, None, redundancy, LabelSettings())
    np.testing.assert_array_equal(label, np.where(whole == schema.LABEL_SUPERNODE, whole, 0))
    assert (factor == 1).all()
    label, factor = labels.label_ffn(lp, conn, None, LabelSettings())
    np.testing.assert_array_equal(label, whole)
    assert (factor == 1).all()
    label, factor = labels.label_ffn(np.full(50, np.nan), conn, redundancy, LabelSettings())
    assert not label.any()
    assert (factor == 1).all()


@pytest.mark.parametrize(
    ("dimensions", "size", "sizes"),
    [
        (576, 256, (16, 32, 64, 128, 256, 512)),
        (64, 8, (8, 16, 32)),
        (12, 256, (256,)),
        (64, 64, (16, 32, 64)),
    ],
)
def test_support_sizes(dimensions, size, sizes):
    assert labels.support_sizes(dimensions, size) == sizes


@pytest.mark.parametrize(
    ("channels", "rho", "count"),
    [
        (14336, 0.01, 143),
        (1536, 0.01, 15),
        (50, 0.01, 1),
        (100, 0.29, 29),
        (7, 1.0, 7),
        (100, 0.0, 1),
    ],
)
def test_supernode_count(channels, rho, count):
    assert labels.supernode_count(channels, rho) == count


def test_ties_go_to_the_lowest_index():
    assert labels.top_indices(np.array([1.0, 2.0, 2.0, 1.0, 2.0]), 2).tolist() == [1, 2]


def test_small_covariances_are_correlations_all_the_same():
    random = np.random.default_rng(0)
    a = random.normal(0, 1e-9, 5000)
    b = 0.6 * a + 0.8 * random.normal(0, 1e-9, 5000)
    r = labels.pearson(np.array([[a @ b]]), np.array([a.sum()]), np.array([a @ a]), np.array([b.sum()]), np.array([b @ b]), 5000)
    assert r[0, 0] == pytest.approx(np.corrcoef(a, b)[0, 1], rel=1e-9)
    assert labels.pair_redundancy(r)[0, 0] == pytest.approx(-0.5 * np.log(1 - r[0, 0] ** 2))


def test_identical_channels_have_finite_redundancy():
    assert labels.pair_redundancy(np.array([1.0]))[0] == schema.MAX_REDUNDANCY
    assert labels.pair_redundancy(np.array([-0.9, 0.0])).tolist() == [0.0, 0.0]


def test_unknown_redundancy_keeps_full_protection():
    redundancy = np.array([np.nan, 0.1, 0.2, np.nan])
    factor = labels.protection(redundancy, np.array([0, 1, 2]), 0.2, 8)
    assert factor.tolist() == [1.0, 1.0, pytest.approx(0.2), 1.0]


def test_read_connectivity():
    gate, up = np.array([[1.0, -1.0], [0.0, 0.0]]), np.array([[2.0, 0.0], [0.0, 0.0]])
    assert labels.read_connectivity([gate, up], np.array([0])).tolist() == [0.75, 0.0]


def test_concentration_known_values():
    one = concentration(np.array([0.0, 4.0, 0.0, 0.0]))
    assert (one.mass, one.top_share, one.effective_channels, one.max_over_mean, one.gini) == (4, 1, 1, 4, 0.75)
    even = concentration(np.ones(200), 0.01)
    assert even.top_share == pytest.approx(0.01)
    assert even.effective_channels == pytest.approx(200)
    assert even.gini == pytest.approx(0)
    assert concentration(np.zeros(5)).mass == 0


def test_the_nearest_against_sorting():
    generator = np.random.default_rng(3)
    correlation = generator.uniform(-1, 1, (40, 5))
    core = np.array([2, 7, 11, 30, 39])
    ids, values = labels.nearest_in_core(correlation, core, 3)
    write, support = generator.normal(size=(20, 40)), np.array([1, 4, 5, 9])
    write[:, 6] = 0
    dimensions, shares = labels.written_dimensions(write, support, 3)
    for channel in range(40):
        pairs = sorted(
            (
                (-0.5 * np.log(1 - r**2), -other)
                for r, other in zip(correlation[channel], core, strict=True)
                if r > 0 and other != channel
            ),
            reverse=True,
        )[:3]
        assert ids[:, channel].tolist() == [-other for _, other in pairs] + [-1] * (3 - len(pairs))
        np.testing.assert_allclose(values[: len(pairs), channel], [value for value, _ in pairs], rtol=1e-6)
        assert np.isnan(values[len(pairs) :, channel]).all()
        if channel == 6:
            assert dimensions[:, 6].tolist() == [-1, -1, -1]
            continue
        column = np.abs(write[:, channel])
        best = sorted(support, key=lambda place: -column[place])[:3]
        assert dimensions[:, channel].tolist() == best
        np.testing.assert_allclose(shares[:, channel], column[best] / column.sum(), rtol=1e-6)


def test_a_core_of_one_has_one_partner():
    ids, values = labels.nearest_in_core(np.array([[0.5], [1.0]]), np.array([1]), 3)
    assert ids.tolist() == [[1, -1], [-1, -1], [-1, -1]]
    assert np.isnan(values).tolist() == [[False, True], [True, True], [True, True]]
