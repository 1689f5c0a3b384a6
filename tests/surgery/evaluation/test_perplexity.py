"""Losses by block and their comparison, against plain transformers, scipy, and numbers worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch

from chanfmt.base.errors import ModelError, UsageError
from surgery.evaluation.perplexity import BlockLosses, block_losses, paired_bootstrap
from tests.support.tiny import CONFIGS, random_tokens, tiny_model


def losses(nll, predicted) -> BlockLosses:
    return BlockLosses(np.array(nll, dtype=np.float64), np.array(predicted, dtype=np.int64))


def drawn(generator, blocks: int, hardness=None, shift: float = 0.0) -> BlockLosses:
    """Blocks of two lengths whose tokens cost what ``hardness`` says, and a little noise."""
    predicted = np.where(np.arange(blocks) % 3 == 0, 20, 60)
    hardness = generator.normal(3, 0.5, blocks) if hardness is None else hardness
    return losses(predicted * (hardness + shift + generator.normal(0, 0.02, blocks)), predicted)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_every_block_is_what_transformers_computes_with_labels(model_type):
    model = tiny_model(model_type, dtype=torch.float64)
    ids = random_tokens(1, 170)[0]
    steps: list[int] = []
    found = block_losses(model, ids.numpy().astype(np.int32), 48, progress=steps.append)
    expected = []
    for block in ids.split(48):
        with torch.no_grad():
            expected.append(float(model(block[None], labels=block[None]).loss) * (len(block) - 1))
    # transformers' own loss is in float32, whatever the model is in.
    np.testing.assert_allclose(found.nll, expected, rtol=2e-6)
    assert found.nll.dtype == np.float64
    assert found.predicted.dtype == np.int64
    assert found.predicted.tolist() == [47, 47, 47, 25]
    assert steps == [48, 48, 48, 26]
    assert found.mean == pytest.approx(sum(expected) / 166, rel=2e-6)
    assert found.perplexity == pytest.approx(math.exp(sum(expected) / 166), rel=2e-5)


def test_terms_are_added_up_in_float64():
    model = tiny_model("llama", max_position_embeddings=4096)
    ids = random_tokens(1, 4096)[0]
    found = block_losses(model, ids.numpy(), 4096)
    with torch.no_grad():
        terms = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
    exact = math.fsum(terms.tolist())
    # In float32, the sum would already be off by 3e-8.
    assert found.nll[0] == pytest.approx(exact, rel=2e-9)


def test_a_last_block_of_one_token_is_left_out():
    model, ids = tiny_model("llama"), random_tokens(1, 97)[0].numpy()
    found, whole = block_losses(model, ids, 48), block_losses(model, ids[:96], 48)
    assert found.predicted.tolist() == [47, 47]
    assert found.nll.tolist() == whole.nll.tolist()


def test_blocks_do_not_see_each_other():
    model, ids = tiny_model("llama"), random_tokens(1, 96)[0].numpy()
    changed = ids.copy()
    changed[:48] = changed[:48][::-1]
    before, after = block_losses(model, ids, 48), block_losses(model, changed, 48)
    assert before.nll[0] != after.nll[0]
    assert before.nll[1] == after.nll[1]


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_predict_is_refused(count):
    with pytest.raises(UsageError, match=f"no token can be predicted: there are {count}"):
        block_losses(tiny_model("llama"), np.full(count, 5), 48)


def test_a_loss_that_is_not_finite_names_its_block():
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = math.inf
    ids = random_tokens(1, 170)[0].numpy()
    ids[ids == 7] = 8
    assert np.isfinite(block_losses(model, ids, 48).nll).all()
    ids[110] = 7
    with pytest.raises(ModelError, match=r"the loss of tiny in block 2 \(tokens 96 to 143\) is not finite") as caught:
        block_losses(model, ids, 48, name="tiny")
    # The model is in float32 already, so float32 would not help.
    assert caught.value.hint is None
    with pytest.raises(ModelError) as caught:
        block_losses(model.bfloat16(), ids, 48)
    assert "--dtype float32" in caught.value.hint


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux only")
def test_memory_that_runs_out_names_the_block():
    # In a process of its own, whose address space ends a gigabyte beyond what it has: eager attention over 40,000
    # tokens wants 38.
    script = (
        "import re, resource, numpy\n"
        "from surgery.evaluation.perplexity import block_losses\n"
        "from tests.support.tiny import tiny_model\n"
        "model = tiny_model('llama', max_position_embeddings=50_000)\n"
        "model.set_attn_implementation('eager')\n"
        "ids = numpy.arange(40_000) % 200\n"
        "block_losses(model, ids[:64], 64)\n"
        "size = int(re.search(r'VmSize:\\s*(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30),) * 2)\n"
        "block_losses(model, ids, 40_000)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "ChanfmtError: out of memory with a block of 40000 tokens" in done.stderr
    assert "use --dtype bfloat16, or a smaller --seq-len" in done.stderr


def test_standard_error_by_hand():
    # Equal blocks: the standard deviation of their means over the root of their number.
    assert losses([30, 36, 24, 42], [10] * 4).standard_error == pytest.approx(np.std([3, 3.6, 2.4, 4.2], ddof=1) / 2)
    # Unequal: mean 13/6, residuals +4/3 and -4/3, root of 2/1 x 32/9 over 6.
    assert losses([10, 3], [4, 2]).standard_error == pytest.approx(4 / 9)
    assert math.isnan(losses([10], [4]).standard_error)
    assert losses([8, 4], [4, 2]).standard_error == 0


def test_standard_error_is_how_far_means_scatter():
    generator = np.random.default_rng(5)
    samples = [drawn(generator, 60) for _ in range(1500)]
    scatter = np.std([sample.mean for sample in samples], ddof=1)
    assert np.mean([sample.standard_error for sample in samples]) == pytest.approx(scatter, rel=0.07)


def test_perplexity_beyond_float64_is_infinite():
    assert losses([8000], [10]).perplexity == math.inf
    assert losses([6900], [10]).perplexity == math.exp(690)


def test_the_interval_is_scipys():
    generator = np.random.default_rng(1)
    hardness = generator.normal(3, 0.5, 40)
    first, second = drawn(generator, 40, hardness), drawn(generator, 40, hardness, shift=0.1)
    found = paired_bootstrap(first, second)
    theirs = scipy.stats.bootstrap(
        (first.nll, second.nll, first.predicted),
        lambda a, b, n, axis: (b.sum(axis) - a.sum(axis)) / n.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert found.difference == pytest.approx(second.mean - first.mean, rel=1e-12)
    assert found.low == pytest.approx(theirs.low, abs=0.04 * width)
    assert found.high == pytest.approx(theirs.high, abs=0.04 * width)
    assert found.ratio == pytest.approx((second.perplexity / first.perplexity, math.exp(found.low), math.exp(found.high)))
    # Unpaired, what makes a block hard would drown the difference.
    assert width < 0.3 * first.standard_error
    assert (found.blocks, found.resamples, found.confidence) == (40, 10_000, 0.95)


def test_resamples_of_many_blocks_are_drawn_in_parts():
    generator = np.random.default_rng(3)
    hardness = generator.normal(3, 0.5, 700)
    first, second = drawn(generator, 700, hardness), drawn(generator, 700, hardness, shift=0.01)
    found = paired_bootstrap(first, second)
    half = scipy.stats.norm.ppf(0.975) * losses(second.nll - first.nll, first.predicted).standard_error
    assert found.high - found.difference == pytest.approx(half, rel=0.06)
    assert found.difference - found.low == pytest.approx(half, rel=0.06)
    assert found.low > 0


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(4)
    covered = 0
    for _ in range(400):
        hardness = generator.normal(3, 0.5, 50)
        first, second = drawn(generator, 50, hardness), drawn(generator, 50, hardness, shift=0.02)
        found = paired_bootstrap(first, second, resamples=1000)
        covered += found.low <= 0.02 <= found.high
    # 380 expected; the percentile interval of 50 blocks is a little narrow.
    assert 362 <= covered <= 392


def test_a_comparison_is_its_seeds():
    generator = np.random.default_rng(6)
    first, second = drawn(generator, 20), drawn(generator, 20)
    found = paired_bootstrap(first, second)
    assert paired_bootstrap(first, second) == found
    assert paired_bootstrap(first, second, seed=1) != found
    back = paired_bootstrap(second, first)
    assert (back.difference, back.low, back.high) == pytest.approx((-found.difference, -found.high, -found.low), rel=1e-9)
    assert paired_bootstrap(first, second, confidence=0.5).high < found.high


def test_a_model_is_no_different_from_itself():
    first = drawn(np.random.default_rng(7), 20)
    found = paired_bootstrap(first, first)
    assert (found.difference, found.low, found.high, found.ratio) == (0, 0, 0, (1, 1, 1))


def test_one_block_has_a_difference_and_no_interval():
    found = paired_bootstrap(losses([10], [4]), losses([12], [4]))
    assert found.difference == 0.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.ratio[0] == pytest.approx(math.exp(0.5))
    assert math.isnan(found.ratio[1])


def test_other_blocks_are_refused():
    with pytest.raises(ValueError, match="not of the same blocks"):
        paired_bootstrap(losses([10, 3], [4, 2]), losses([10, 3], [4, 3]))


def test_bos_takes_the_place_of_the_first_token_of_every_block():
    model = tiny_model("llama")
    ids = np.random.default_rng(0).integers(3, 100, 50)
    ids[20] = 1
    found = block_losses(model, ids, 20, before=(1,))
    plain = block_losses(model, ids, 20)
    changed = ids.copy()
    changed[[0, 20, 40]] = 1
    expected = block_losses(model, changed, 20)
    np.testing.assert_array_equal(found.nll, expected.nll)
    np.testing.assert_array_equal(found.predicted, plain.predicted)
    # The second block begins with it anyway.
    assert found.nll[1] == plain.nll[1]
    assert found.nll[0] != plain.nll[0]


def test_several_tokens_before_a_block_are_not_predicted():
    model = tiny_model("llama")
    ids = np.random.default_rng(0).integers(3, 100, 24)
    found = block_losses(model, ids, 12, before=(1, 2))
    assert found.predicted.tolist() == [11, 11]
    for number, block in enumerate((ids[:12], ids[12:])):
        row = torch.tensor([[1, 2, *block[1:]]])
        with torch.no_grad():
            logits = model(row).logits.double().log_softmax(-1)[0]
        expected = -sum(float(logits[place - 1, row[0, place]]) for place in range(2, 13))
        assert found.nll[number] == pytest.approx(expected, rel=1e-5)
