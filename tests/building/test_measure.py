"""The pass against a direct computation: one sequence at a time, plain autograd on u, float64 sums."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from chanfmt.algebra import labels, metrics
from chanfmt.analysis.chance import turn_offset
from chanfmt.base.errors import ChanfmtError
from chanfmt.building.measure import measure
from chanfmt.building.statistics import CoreCorrelation
from chanfmt.data.tokens import canonical
from chanfmt.format import schema
from chanfmt.models.find.discover import find_ffns
from tests.support.direct import assert_metrics_close, direct, direct_sums, members
from tests.support.tiny import CONFIGS, random_tokens, tiny_model

SUMS = [variable.name for variable in schema.SUMS]


def correlations(sums, columns):
    """Pearson correlations of all channels with the candidates at ``columns``, float64 (m, len(columns))."""
    channel, other = sums.channel.cpu().numpy(), sums.other.cpu().numpy()[:, columns]
    return labels.pearson(sums.cross.cpu().numpy()[:, columns], channel[0], channel[1], other[0], other[1], sums.count)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_equals_direct_computation(model_type, dtype, tolerance):
    model = tiny_model(model_type, dtype=dtype)
    model.requires_grad_(False)
    ffns = find_ffns(model)
    tokens = canonical(random_tokens(9, 40).numpy())
    found = measure(model, ffns, tokens, rho=0.03, batch_size=4)
    us, ss = direct(model, ffns, torch.from_numpy(tokens.ids).long())
    for ffn, (statistics,) in zip(ffns, members(found), strict=True):
        u, s = us[ffn.write], ss[ffn.write]
        expected = direct_sums(u, s)
        for name in ("sum_u2", "sum_s2", "sum_abs_q", "sum_q2"):
            assert_metrics_close(statistics.sums[name].numpy(), expected[name], tolerance)
        for name in ("sum_u", "sum_q"):
            # The terms of signed sums cancel, so their error is relative to the sum of magnitudes.
            magnitude = np.abs(u if name == "sum_u" else u * s).sum((0, 1)).max()
            assert np.abs(statistics.sums[name].numpy() - expected[name]).max() < tolerance * magnitude
        q2 = (u * s) ** 2
        for split in range(schema.SPLITS):
            assert_metrics_close(statistics.split_q2[split].numpy(), q2[tokens.split_of == split].sum((0, 1)), tolerance)
        np.testing.assert_allclose(statistics.max_abs_u.numpy(), np.abs(u).max((0, 1)), rtol=1e-6)
        assert statistics.tokens == 9 * 40
        derived = metrics.derive_metrics(
            {name: value.numpy() for name, value in statistics.sums.items()}, np.int64(statistics.tokens)
        )
        assert_metrics_close(derived["lp"], 0.5 * q2.mean((0, 1)), max(tolerance, 1e-6))


@pytest.mark.parametrize("model_type", ["llama", "opt", "bert"])
def test_redundancy_equals_correlation_of_all_tokens(model_type):
    model = tiny_model(model_type, dtype=torch.float64)
    model.requires_grad_(False)
    ffns = find_ffns(model)
    tokens = canonical(random_tokens(17, 24).numpy())
    found = measure(model, ffns, tokens, rho=0.03, batch_size=5)
    us, ss = direct(model, ffns, torch.from_numpy(tokens.ids).long())
    after = tokens.split_of > 0
    for ffn, (statistics,) in zip(ffns, members(found), strict=True):
        q = (us[ffn.write] * ss[ffn.write])[after]
        candidates = statistics.core.candidates.numpy()
        columns = np.arange(len(candidates))
        flat = q.reshape(-1, q.shape[-1])
        expected = np.corrcoef(flat.T)[:, candidates]
        np.testing.assert_allclose(correlations(statistics.core.real, columns), expected, atol=1e-9)
        ours, theirs = q[1:].reshape(-1, q.shape[-1]), q[:-1].reshape(-1, q.shape[-1])[:, candidates]
        null = np.array([[np.corrcoef(ours[:, i], theirs[:, j])[0, 1] for j in columns] for i in range(q.shape[-1])])
        np.testing.assert_allclose(correlations(statistics.core.null, columns), null, atol=1e-9)
        # Sequence by sequence, the candidates' tokens begin at another place: the multiples of the golden ratio, over 1 to 23.
        offsets = [1 + int((number + 1) * 0.6180339887498949 % 1 * 23) for number in range(len(q) - 1)]
        assert len(set(offsets)) > len(offsets) / 2
        turned = [np.concatenate([row[-offset:], row[:-offset]]) for row, offset in zip(q[:-1], offsets, strict=True)]
        theirs = np.concatenate(turned)[:, candidates]
        chance = np.array([[np.corrcoef(ours[:, i], theirs[:, j])[0, 1] for j in columns] for i in range(q.shape[-1])])
        np.testing.assert_allclose(correlations(statistics.core.chance, columns), chance, atol=1e-6)


@pytest.mark.parametrize(("length", "least"), [(2, 1), (3, 1), (24, 1), (512, 1), (512, 128), (1, 0)])
def test_offsets_cover_their_range_evenly(length, least):
    count = length - 2 * least + 1
    found = np.bincount([turn_offset(number, length, least) for number in range(8 * count)], minlength=length + 1)
    assert found[:least].sum() == found[length - least + 1 :].sum() == 0
    assert found[least : length - least + 1].min() >= 4
    assert found.max() <= 12


def test_the_null_of_chance_has_no_effect_of_the_position():
    """q is a function of the position plus noise: the correlation stays in the null of equal positions, and leaves the other."""
    random = np.random.default_rng(0)
    trend = np.sin(np.arange(64) / 64 * 2 * np.pi)
    q = torch.from_numpy(trend[None, :, None] + 0.5 * random.normal(size=(40, 64, 6)))
    correlation = CoreCorrelation(torch.tensor([0, 1]), 6)
    for batch in q.split(7):
        correlation.add(batch, torch.stack([batch.sum(1), batch.square().sum(1)]))
    columns = np.arange(2)
    assert correlations(correlation.null, columns).min() > 0.6
    assert np.abs(correlations(correlation.chance, columns)).max() < 0.1


def test_batch_size_and_block_order_do_not_matter():
    model = tiny_model("llama", dtype=torch.float64)
    model.requires_grad_(False)
    ffns = find_ffns(model)
    ids = random_tokens(11, 32).numpy()
    shuffled = ids[np.random.default_rng(1).permutation(len(ids))]
    first = measure(model, ffns, canonical(ids), rho=0.03, batch_size=1)
    for blocks, batch_size in ((ids, 4), (shuffled, 11), (shuffled, 3)):
        other = measure(model, ffns, canonical(blocks), rho=0.03, batch_size=batch_size)
        assert other.mean_loss == pytest.approx(first.mean_loss, rel=1e-12)
        for (a,), (b,) in zip(members(first), members(other), strict=True):
            for name in SUMS:
                np.testing.assert_allclose(a.sums[name].numpy(), b.sums[name].numpy(), rtol=1e-9, atol=1e-15)
            columns = np.arange(len(a.core.candidates))
            np.testing.assert_array_equal(a.core.candidates.numpy(), b.core.candidates.numpy())
            pairs = ((a.core.real, b.core.real, 1e-9), (a.core.null, b.core.null, 1e-9), (a.core.chance, b.core.chance, 1e-6))
            for x, y, tolerance in pairs:
                np.testing.assert_allclose(correlations(x, columns), correlations(y, columns), atol=tolerance)


def test_dead_channel_is_zero_and_uncorrelated():
    model = tiny_model("llama", dtype=torch.float64)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] = 0
    model.requires_grad_(False)
    ffns = find_ffns(model)
    found = measure(model, ffns, canonical(random_tokens(9, 24).numpy()), rho=0.03)
    (statistics,) = members(found)[1]
    assert all(float(statistics.sums[name][5]) == 0 for name in SUMS if name != "sum_s2")
    correlation = correlations(statistics.core.real, np.arange(len(statistics.core.candidates)))
    assert not correlation[5].any()
    assert np.isfinite(correlation).all()


def test_one_sequence_leaves_redundancy_undefined():
    model = tiny_model("gpt2")
    model.requires_grad_(False)
    ffns = find_ffns(model)
    found = measure(model, ffns, canonical(random_tokens(1, 24).numpy()), rho=0.03)
    assert all(statistics.core.real.count == 0 for (statistics,) in members(found))


def test_hooks_leave_nothing_behind():
    model = tiny_model("llama")
    model.requires_grad_(False)
    ffns = find_ffns(model)
    measure(model, ffns, canonical(random_tokens(4, 24).numpy()), rho=0.03)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_candidates_follow_the_first_split():
    model = tiny_model("llama", dtype=torch.float64)
    model.requires_grad_(False)
    ffns = find_ffns(model)
    tokens = canonical(random_tokens(16, 24).numpy())
    found = measure(model, ffns, tokens, rho=0.03)
    for (statistics,) in members(found):
        count = len(statistics.core.candidates)
        expected = labels.top_indices(statistics.split_q2[0].numpy(), count)
        np.testing.assert_array_equal(statistics.core.candidates.numpy(), expected)


def test_a_batch_that_does_not_fit_is_halved_and_nothing_counted_twice():
    model = tiny_model("llama", dtype=torch.float64)
    model.requires_grad_(False)
    ffns = find_ffns(model)
    tokens = canonical(random_tokens(80, 24).numpy())

    def too_large(module, args):
        # A real device runs out of memory in the middle of the pass: the first batch still fits.
        if torch.is_grad_enabled() and args[0].shape[0] > 6 and next(calls) > 0:
            raise torch.OutOfMemoryError("this batch does not fit")

    calls = itertools.count()
    handle = model.model.layers[2].mlp.register_forward_pre_hook(too_large)
    counts = []
    found = measure(model, ffns, tokens, rho=0.03, progress=counts.append)
    with pytest.raises(ChanfmtError, match="out of memory with 20 sequences"):
        measure(model, ffns, tokens, rho=0.03, batch_size=20)
    handle.remove()
    assert sum(counts) == 80 * 24
    expected = measure(model, ffns, tokens, rho=0.03, batch_size=1)
    for (a,), (b,) in zip(members(found), members(expected), strict=True):
        assert a.tokens == b.tokens == 80 * 24
        for name in SUMS:
            np.testing.assert_allclose(a.sums[name].numpy(), b.sums[name].numpy(), rtol=1e-9, atol=1e-15)
