"""Sequences that the model writes: by its own distribution, by the seed, with its cache or without."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chanfmt.base.errors import ModelError, UsageError
from chanfmt.data import sampled
from chanfmt.data.sampled import sample_sequences
from chanfmt.format.records import SpecialTokens
from tests.support.tiny import CONFIGS, VOCAB, tiny_model, tiny_tokenizer

BOS = 1
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
"""Fields of a Mamba config. Mamba's cache has another name."""


def sequences_of(model, sequences=6, seq_len=24, seed=0, tokenizer=None, **options):
    return sample_sequences(model, tokenizer or tiny_tokenizer(), sequences, seq_len, seed, name="m", **options)


def without(*names):
    tokenizer = tiny_tokenizer()
    for name in names:
        setattr(tokenizer, name, None)
    return tokenizer


@pytest.mark.parametrize("model_type", [*CONFIGS, "mamba"])
def test_the_cache_changes_nothing(model_type, monkeypatch):
    # In float32 another kernel's rounding may, once in some thousand tokens, fall on the other side of a boundary.
    model = tiny_model(model_type, **(MAMBA if model_type == "mamba" else {})).double()
    assert sampled._cache_works(model, torch.device("cpu")) == (model_type != "mamba")
    found = sequences_of(model)
    assert (found.shape, found.dtype) == ((6, 24), np.int32)
    assert (found[:, 0] == BOS).all()
    monkeypatch.setattr(sampled, "_cache_works", lambda *_: False)
    np.testing.assert_array_equal(sequences_of(model), found)


def test_the_seed_decides_and_the_batch_does_not():
    model = tiny_model("llama")
    found = sequences_of(model)
    np.testing.assert_array_equal(sequences_of(model), found)
    np.testing.assert_array_equal(sequences_of(model, batch_size=4), found)
    other = sequences_of(model, seed=1)
    assert (other != found).mean() > 0.5
    assert len(np.unique(found, axis=0)) == len(found)


def test_tokens_follow_the_models_distribution():
    model = tiny_model("llama")
    count = 4000
    second = sequences_of(model, sequences=count, seq_len=2, batch_size=count)[:, 1]
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([[BOS]])).logits[0, -1].double(), -1).numpy()
    seen = np.bincount(second, minlength=VOCAB)
    # Pearson's chi squared: mean VOCAB - 1, deviation sqrt(2 (VOCAB - 1)).
    chi = ((seen - count * expected) ** 2 / (count * expected)).sum()
    assert abs(chi - (VOCAB - 1)) < 5 * (2 * (VOCAB - 1)) ** 0.5


def test_a_token_that_cannot_come_does_not():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, -1)
    uniform = torch.tensor([[0.0], [0.4999], [0.5], [1 - 2**-53]], dtype=torch.float64)
    assert sampled._pick(logits, uniform).ravel().tolist() == [1, 1, 3, 3]
    with pytest.raises(ModelError, match="not finite"):
        sampled._pick(torch.full((1, 3), torch.nan), uniform[:1])


def test_without_bos_a_random_ordinary_token_is_first():
    tokenizer = without("bos_token")
    found = sequences_of(tiny_model("llama"), sequences=40, seq_len=4, tokenizer=tokenizer)
    first = found[:, 0]
    assert len(np.unique(first)) > 20
    assert not np.isin(first, tokenizer.all_special_ids).any()
    assert first.max() < len(tokenizer)
    np.testing.assert_array_equal(sequences_of(tiny_model("llama"), sequences=40, seq_len=4, tokenizer=tokenizer), found)


def test_sequences_begin_and_end_with_the_special_tokens():
    model = tiny_model("llama").double()
    special = SpecialTokens((2, 1), (2,))
    found = sequences_of(model, seq_len=12, special=special)
    assert found.shape == (6, 12)
    assert (found[:, :2] == (2, 1)).all()
    assert (found[:, -1] == 2).all()
    # The sampled part continues the special tokens: the first one follows their distribution.
    uniform = np.random.default_rng(0).random((6, 9))
    with torch.no_grad():
        logits = model(torch.tensor([[2, 1]])).logits[:, -1].expand(6, -1)
    np.testing.assert_array_equal(found[:, 2], sampled._pick(logits, torch.from_numpy(uniform[:, :1])).ravel().numpy())
    bos = sequences_of(model, seq_len=12, special=SpecialTokens((BOS,), ()))
    np.testing.assert_array_equal(bos, sequences_of(model, seq_len=12))
    assert len(np.unique(sequences_of(model, seq_len=12, bos=False)[:, 0])) > 1
    with pytest.raises(UsageError, match="--seq-len 3 leaves no place for a sampled token: every sequence has 3 given ones"):
        sequences_of(model, seq_len=3, special=special)


def test_neither_eos_nor_pad_is_needed():
    np.testing.assert_array_equal(
        sequences_of(tiny_model("llama"), tokenizer=without("eos_token", "pad_token")), sequences_of(tiny_model("llama"))
    )


def test_a_bos_beyond_the_embedding_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<new{index}>" for index in range(120)])
    tokenizer.bos_token = "<new119>"
    with pytest.raises(ModelError, match="'<new119>', lies beyond the 211 rows"):
        sequences_of(tiny_model("llama"), tokenizer=tokenizer)


def test_an_encoder_writes_nothing():
    with pytest.raises(UsageError, match="--calib self: BertLMHeadModel is an encoder"):
        sequences_of(tiny_model("bert", is_decoder=False))


def test_an_encoder_decoder_writes_nothing():
    import transformers

    config = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(UsageError, match="m is an encoder-decoder"):
        sequences_of(transformers.T5ForConditionalGeneration(config))


def test_progress_counts_every_token():
    told = []
    sequences_of(tiny_model("gpt2"), sequences=5, seq_len=9, batch_size=2, progress=told.append)
    assert sum(told) == 5 * 8


def test_a_model_that_cannot_go_on_says_so():
    with pytest.raises(ModelError, match="m cannot continue a text to 200 tokens"):
        sequences_of(tiny_model("gpt2"), sequences=1, seq_len=200)
