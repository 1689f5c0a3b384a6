"""The definitions on tensors against those of `chanfmt.algebra.labels` on arrays, for weights of several dtypes and layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chanfmt.algebra import labels
from chanfmt.building import weight_metrics
from chanfmt.building.on_device import largest, nearest_in_core, pair_redundancies, redundancy_to_core
from chanfmt.building.statistics import PairSums
from chanfmt.building.weight_metrics import reading, writing
from chanfmt.format import schema
from chanfmt.models.matrices import FFNWeights

D, M = 40, 93


def weights(dtype, transposed):
    random = torch.Generator().manual_seed(1)

    def matrix(rows, columns):
        made = torch.randn((columns, rows) if transposed else (rows, columns), generator=random).to(dtype)
        return made.T if transposed else made

    write = matrix(D, M)
    write[:, 7] = 0
    write[:, 8] = write[:, 9]
    return FFNWeights(write, {role: matrix(M, D) for role in ("gate", "up")})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("part", [1, 300, 1 << 20])
def test_metrics_of_weights(dtype, transposed, part, monkeypatch):
    monkeypatch.setattr(weight_metrics, "_CPU_PART", part)
    given = weights(dtype, transposed)
    write, reads = given.write.double().numpy(), {role: rows.double().numpy() for role, rows in given.reads.items()}
    core, size = np.array([3, 8, 60]), 10
    power, support = np.random.default_rng(0).random(D), np.array([0, 5, 39])
    found, sizes = writing(given.write, core, size), labels.support_sizes(D, size)
    assert not found.connectivity[:, 7].any()
    close = {"rtol": 1e-13, "atol": 0}
    np.testing.assert_allclose(found.connectivity, labels.connectivity(write, core, sizes), **close)
    np.testing.assert_allclose(found.mass, labels.write_mass(write, core), **close)
    np.testing.assert_allclose(found.norm, np.linalg.norm(write, axis=0), **close)
    np.testing.assert_allclose(found.norm_l1, np.abs(write).sum(0), **close)
    expected = labels.written_dimensions(write, labels.write_support(write, core, size), schema.NEAREST)
    np.testing.assert_array_equal(found.dimension, expected[0])
    np.testing.assert_array_equal(found.share, expected[1])
    rows = reading(given, support, torch.from_numpy(power))
    np.testing.assert_allclose(rows.connectivity, labels.read_connectivity(list(reads.values()), support), **close)
    np.testing.assert_allclose(rows.wanda, sum(np.abs(each) @ np.sqrt(power) for each in reads.values()), **close)
    for role, each in reads.items():
        np.testing.assert_allclose(rows.norms[f"{role}_norm"], np.linalg.norm(each, axis=1), **close)
    assert np.isnan(reading(given, None, torch.from_numpy(power)).connectivity).all()


def test_without_a_core_only_the_norms_are_known():
    found = writing(weights(torch.float32, False).write, None, 10)
    assert (found.norm > 0).sum() == M - 1
    assert np.isnan(found.connectivity).all()
    assert (found.dimension == -1).all()
    assert not found.mass.any()


@pytest.mark.parametrize("covered", [0, 1, 4])
def test_redundancy_to_the_core(covered):
    random = np.random.default_rng(3)
    q = random.standard_normal((50, M))
    q[:, 5] = 2.5
    q[:, 6] = q[:, 7] * 3
    candidates = np.array([2, 7, 30, 31, 80, 90])
    core = candidates[:covered]
    sums = PairSums(M, len(candidates), torch.device("cpu"))
    given, other = torch.from_numpy(q)[None], torch.from_numpy(q[:, candidates])[None]
    sums.add(given, other, *(torch.stack([part.sum((0, 1)), part.square().sum((0, 1))]) for part in (given, other)))
    pairs = pair_redundancies(sums, torch.arange(covered), torch.from_numpy(core))
    correlation = labels.pearson(q.T @ q[:, core], q.sum(0), (q**2).sum(0), q[:, core].sum(0), (q[:, core] ** 2).sum(0), len(q))
    expected = labels.redundancy_to_core(correlation, core, 3)
    np.testing.assert_allclose(redundancy_to_core(pairs, 3).numpy(), expected, rtol=1e-6, atol=1e-13)
    for ours, theirs in zip(
        nearest_in_core(pairs, torch.from_numpy(core)), labels.nearest_in_core(correlation, core, schema.NEAREST), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_the_first_of_equal_values_comes_first():
    values = torch.tensor([[0.5, 0.0], [1.0, -1.0], [1.0, 0.0], [0.5, 0.25]])
    ids, best = largest(values, torch.tensor([10, 11, 12, 13]), 3)
    assert ids.tolist() == [[11, 13], [12, -1], [10, -1]]
    assert best[:, 0].tolist() == [1.0, 1.0, 0.5]
    assert np.isnan(best[1:, 1]).all()
