"""The losses of models that do not predict next tokens: values, independence of the batch, and the choice."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from chanfmt.base.errors import ModelError, UsageError
from chanfmt.building.loss import EmbeddingLoss, MaskedTokenLoss, ReconstructionLoss, choose_loss
from chanfmt.building.measure import measure
from chanfmt.cli.main import main
from chanfmt.data.tokens import canonical
from chanfmt.format.records import SpecialTokens
from chanfmt.models.find.discover import find_ffns
from tests.support.tiny import random_tokens, tiny_model, tiny_tokenizer
from tests.support.zoo import tiny


@pytest.fixture
def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return tokenizer


def test_masked_tokens(tokenizer):
    model = tiny("bert", "masked").requires_grad_(False)
    ids = random_tokens(3, 40) % 100
    loss = choose_loss(model, tokenizer, ids)
    assert isinstance(loss, MaskedTokenLoss)
    assert loss.terms(40) == 6
    seen = []
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    with torch.enable_grad():
        model.get_input_embeddings().weight.requires_grad_(True)
        value = loss.backward(ids)
        alone = [loss.backward(row[None]) for row in ids]
    handle.remove()
    assert value == pytest.approx(sum(alone), rel=1e-5)
    hidden = seen[0] == tokenizer.mask_token_id
    assert hidden.sum(1).tolist() == [6, 6, 6]
    with torch.no_grad():
        logits = model(seen[0]).logits.log_softmax(-1)
    expected = -sum(logits[i, j, ids[i, j]] for i, j in hidden.nonzero().tolist())
    assert value == pytest.approx(float(expected), rel=1e-5)


def test_the_special_tokens_around_a_sequence_are_not_hidden(tokenizer):
    model = tiny("bert", "masked").requires_grad_(False)
    special = SpecialTokens((1,), (2, 0))
    loss = choose_loss(model, tokenizer, random_tokens(1, 8), special=special)
    assert isinstance(loss, MaskedTokenLoss)
    assert loss.terms(43) == 6
    hidden = torch.stack([loss._hidden(row) for row in random_tokens(200, 13)])
    assert hidden.sum(1).unique().tolist() == [2]
    assert hidden.any(0).tolist() == [False, *[True] * 10, False, False]


@pytest.mark.parametrize("model_type", ["bart", "t5", "mbart"])
def test_the_decoder_begins_as_in_training(tokenizer, model_type):
    """The loss is that of transformers on the tokens as labels, whose shift differs from class to class."""
    model = tiny(model_type, "seq2seq").requires_grad_(False)
    if model_type == "t5":
        model.config.decoder_start_token_id = 5
    ids = 3 + random_tokens(2, 12) % 90
    loss = choose_loss(model, tokenizer, ids)
    assert isinstance(loss, ReconstructionLoss)
    model.get_input_embeddings().weight.requires_grad_(True)
    value = loss.backward(ids)
    with torch.no_grad():
        expected = 2 * 12 * model(input_ids=ids, labels=ids).loss
    assert value == pytest.approx(float(expected), rel=1e-5)


def test_a_decoder_without_a_start_token_begins_with_padding():
    model = tiny("t5", "seq2seq")
    assert not hasattr(model.config, "decoder_start_token_id")
    ids = 3 + random_tokens(2, 12) % 90
    shifted = ReconstructionLoss(model).shifted(ids)
    assert shifted[:, 0].tolist() == [model.config.pad_token_id] * 2
    assert torch.equal(shifted[:, 1:], ids[:, :-1])


def test_reconstruction(tokenizer):
    model = tiny("bart", "seq2seq").requires_grad_(False)
    ids = random_tokens(2, 12)
    loss = choose_loss(model, tokenizer, ids)
    assert isinstance(loss, ReconstructionLoss)
    model.get_input_embeddings().weight.requires_grad_(True)
    value = loss.backward(ids)
    with torch.no_grad():
        expected = 2 * 12 * model(input_ids=ids, labels=ids).loss
    assert value == pytest.approx(float(expected), rel=1e-5)


def test_the_embeddings_gradient_is_a_sample_of_its_jacobian():
    """Over many samples the mean of s^2 at one channel and token is the squared norm of dh/du."""
    model = tiny("bert", "masked").requires_grad_(False)
    layer = model.bert.encoder.layer[1].output.dense
    captured = []

    def keep(module, args):
        u = args[0].detach().requires_grad_(True)
        captured.append(u)
        return (u,)

    handle = layer.register_forward_pre_hook(keep)
    loss = EmbeddingLoss(model)
    total = torch.zeros(44)
    rows = random_tokens(400, 3)
    for row in rows:
        loss.backward(row[None])
        total += captured.pop().grad[0, 1].square() / len(rows)
    expected = torch.zeros(44)
    for row in rows[:60]:
        state = model.bert(row[None]).last_hidden_state
        u = captured.pop()
        jacobian = torch.stack([torch.autograd.grad(value, u, retain_graph=True)[0][0, 1] for value in state.flatten()])
        expected += jacobian.square().sum(0) / 60
    handle.remove()
    np.testing.assert_allclose(total, expected, rtol=0.35)
    assert float(total.mean()) == pytest.approx(float(expected.mean()), rel=0.05)


def test_the_choice(tokenizer):
    llama, bert, bart = tiny_model("llama"), tiny("bert", "masked"), tiny("bart", "seq2seq")
    ids = random_tokens(1, 8)
    assert choose_loss(llama, tokenizer, ids).definition == "sum of next-token NLL, nats"
    assert isinstance(choose_loss(llama, tokenizer, ids, "embedding"), EmbeddingLoss)
    with pytest.raises(UsageError, match="has no masked-token loss"):
        choose_loss(llama, tokenizer, ids, "masked-token")
    with pytest.raises(UsageError, match="has no next-token loss"):
        choose_loss(bart, tokenizer, ids, "next-token")
    with pytest.raises(UsageError, match="no mask token"):
        choose_loss(bert, tiny_tokenizer(), ids)
    with pytest.raises(UsageError, match="no head that predicts tokens") as caught:
        choose_loss(bert.bert, tokenizer, ids)
    assert "--loss embedding" in caught.value.hint


@pytest.mark.parametrize(
    ("model_type", "family", "definition"),
    [("bert", "masked", "hidden by the mask token"), ("bart", "seq2seq", "gives back the encoder's tokens")],
)
def test_build_states_its_loss(tmp_path, tokenizer, capsys, model_type, family, definition):
    import chanfmt

    tiny(model_type, family).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = [
        "build",
        str(tmp_path / "model"),
        "-o",
        str(tmp_path / "a.h5"),
        "--calib",
        "pydoc",
        "--sequences",
        "9",
        "--seq-len",
        "24",
    ]
    assert main(arguments) == 0
    assert main(["validate", str(tmp_path / "a.h5")]) == 0
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        assert definition in atlas.calibration.loss
        assert 0 < atlas.calibration.mean_loss < 2 * math.log(211)
        assert {block.place for block in atlas.blocks} == ({"encoder"} if family == "masked" else {"encoder", "decoder"})
    capsys.readouterr()


def test_an_overflowing_gradient_names_its_layer_and_batch():
    model = tiny_model("llama", dtype=torch.float16).requires_grad_(False)
    tokens = canonical(random_tokens(9, 24).numpy())
    ffns = find_ffns(model)
    write = model.get_parameter(ffns[1].write)
    # The write weights are large but meet small u in the forward pass, so only the backward pass overflows.
    for read in ffns[1].members[0].reads:
        model.get_parameter(read.projection.matrix.parameter).mul_(1e-3)
    write.mul_(60000)
    model.lm_head.weight.mul_(100)
    with pytest.raises(ModelError, match=r"a gradient of sequences 0 to \d+ overflowed in layer \d"):
        measure(model, ffns, tokens, rho=0.05)
