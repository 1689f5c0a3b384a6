"""Calibration on a file of the model's own inputs: images, sound, tokens."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pytest
import torch
import transformers

import chanfmt
from chanfmt.cli.main import main
from chanfmt.data.arrays import _digest, draw_samples, read_inputs
from tests.support.tiny import redrawn, save_tiny

VIT = {
    "hidden_size": 36,
    "intermediate_size": 87,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 7,
}
ROWS = 17
SAMPLES = 18


def saved(directory, config, kind):
    torch.manual_seed(0)
    model = redrawn(kind(config), 0)
    model.save_pretrained(directory)
    return model


@pytest.fixture
def vit(tmp_path):
    return saved(tmp_path / "vit", transformers.ViTConfig(**VIT), transformers.ViTForImageClassification)


@pytest.fixture
def whisper(tmp_path):
    config = transformers.WhisperConfig(
        d_model=36,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=87,
        decoder_ffn_dim=91,
        vocab_size=211,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return saved(tmp_path / "whisper", config, transformers.WhisperForConditionalGeneration)


def images(count=SAMPLES, size=16):
    generator = np.random.default_rng(0)
    return {
        "pixel_values": generator.standard_normal((count, 3, size, size)).astype(np.float32),
        "labels": generator.integers(0, 7, count),
    }


def spectra(count=SAMPLES):
    generator = np.random.default_rng(0)
    return {
        "input_features": generator.standard_normal((count, 8, 40)).astype(np.float32),
        "labels": generator.integers(3, 200, (count, 9)),
    }


def built(tmp_path, name, arrays, *more, file="in.npz"):
    np.savez(tmp_path / file, **arrays)
    return main(["build", str(tmp_path / name), "-o", str(tmp_path / "a.h5"), "--calib", str(tmp_path / file), "--quiet", *more])


def sums_by_hand(model, module, run):
    """Sums of u^2 and u s over all rows, by a plain hook and autograd, one sample at a time."""
    u2 = q = 0.0

    def keep(_, args):
        args[0].retain_grad()
        seen.append(args[0])

    handle = model.get_submodule(module).register_forward_pre_hook(keep)
    for index in range(SAMPLES):
        seen: list[torch.Tensor] = []
        run(index).backward()
        u = seen[0].detach()[0].double()
        u2 = u2 + u.square().sum(0)
        q = q + (u * seen[0].grad[0].double()).sum(0)
    handle.remove()
    return u2.numpy(), q.numpy()


def test_an_image_classifier_is_measured_on_its_labels(tmp_path, vit):
    arrays = images()
    assert built(tmp_path, "vit", arrays) == 0
    assert main(["validate", str(tmp_path / "a.h5")]) == 0
    pixels, labels = torch.from_numpy(arrays["pixel_values"]), torch.from_numpy(arrays["labels"])

    def run(index):
        return torch.nn.functional.cross_entropy(vit(pixels[index : index + 1]).logits, labels[index : index + 1])

    module = next(
        name
        for name, item in vit.named_modules()
        if isinstance(item, torch.nn.Linear) and item.in_features == 87 and ".1." in name
    )
    u2, q = sums_by_hand(vit, module, run)
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        stack, record = atlas.stacks["encoder"], atlas.calibration
        np.testing.assert_allclose(stack.row("sum_u2", 1), u2, rtol=1e-5)
        np.testing.assert_allclose(stack.row("sum_q", 1), q, rtol=1e-3, atol=1e-5 * np.abs(q).max())
        assert stack.row("tokens", 1) == SAMPLES * ROWS
        assert record.loss == "sum of the NLL of the labels given with the inputs, nats"
        with torch.no_grad():
            assert record.mean_loss == pytest.approx(float(sum(run(index) for index in range(SAMPLES))) / SAMPLES, rel=1e-5)
        assert (record.tokenizer, record.seq_len, record.token_ids) == ("", ROWS, None)
        (source,) = record.contributions
        assert (source.source, source.range, source.sequences) == ("in.npz", f"0:{SAMPLES}", SAMPLES)
        assert source.revision == hashlib.sha256((tmp_path / "in.npz").read_bytes()).hexdigest()
        assert json.loads(source.inputs) == {"labels": ["i8", []], "pixel_values": ["f4", [3, 16, 16]]}
        row = arrays["pixel_values"][0]
        expected = hashlib.sha256(
            b"labels i8 \n" + arrays["labels"][0].tobytes() + b"pixel_values f4 3,16,16\n" + row.tobytes()
        ).hexdigest()
        assert expected in record.sequence_sha256


def test_whisper_is_measured_through_both_of_its_halves(tmp_path, whisper):
    arrays = spectra()
    assert built(tmp_path, "whisper", arrays) == 0
    assert main(["validate", str(tmp_path / "a.h5")]) == 0
    features, labels = torch.from_numpy(arrays["input_features"]), torch.from_numpy(arrays["labels"])

    def run(index):
        return 9 * whisper(input_features=features[index : index + 1], labels=labels[index : index + 1]).loss

    with chanfmt.open(tmp_path / "a.h5") as atlas:
        assert atlas.calibration.seq_len == 9
        for place, rows in (("encoder", 20), ("decoder", 9)):
            u2, q = sums_by_hand(whisper, f"model.{place}.layers.1.fc2", run)
            stack = atlas.stacks[place]
            np.testing.assert_allclose(stack.row("sum_u2", 1), u2, rtol=1e-5)
            np.testing.assert_allclose(stack.row("sum_q", 1), q, rtol=1e-3, atol=1e-5 * np.abs(q).max())
            assert stack.row("tokens", 1) == SAMPLES * rows


def test_without_labels_it_is_the_embedding(tmp_path, vit):
    arrays = images()
    assert built(tmp_path, "vit", {"pixel_values": arrays["pixel_values"]}) == 0
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        assert "last hidden state" in atlas.calibration.loss
        # Half the squared norm of standard normal noise per row.
        assert atlas.calibration.mean_loss == pytest.approx(36 / 2, rel=0.1)
        whole = atlas.stacks["encoder"]["sum_q2"]
    assert built(tmp_path, "vit", {"pixel_values": arrays["pixel_values"]}, "--overwrite", "--batch-size", "1") == 0
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        np.testing.assert_allclose(atlas.stacks["encoder"]["sum_q2"], whole, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "kind", "given"),
    [
        (transformers.CLIPVisionConfig(**VIT), transformers.CLIPVisionModel, {}),
        (transformers.SiglipVisionConfig(**VIT), transformers.SiglipVisionModel, {}),
        (transformers.ViTMAEConfig(**VIT), transformers.ViTMAEModel, {"noise": (ROWS - 1,)}),
        (transformers.Dinov2Config(**VIT), transformers.Dinov2Model, {}),
    ],
    ids=["clip", "siglip", "vit_mae", "dinov2"],
)
def test_encoders_without_a_head(tmp_path, config, kind, given):
    saved(tmp_path / "model", config, kind)
    generator = np.random.default_rng(1)
    more = {name: generator.random((SAMPLES, *shape)).astype(np.float32) for name, shape in given.items()}
    assert built(tmp_path, "model", {"pixel_values": images()["pixel_values"], **more}) == 0
    assert main(["validate", str(tmp_path / "a.h5")]) == 0


def test_safetensors_hold_the_same_samples(tmp_path, vit):
    from safetensors.numpy import save_file

    arrays = images()
    assert built(tmp_path, "vit", arrays) == 0
    save_file(arrays, tmp_path / "in.safetensors")
    assert (
        main(
            ["build", str(tmp_path / "vit"), "-o", str(tmp_path / "b.h5"), "--calib", str(tmp_path / "in.safetensors"), "--quiet"]
        )
        == 0
    )
    with chanfmt.open(tmp_path / "a.h5") as one, chanfmt.open(tmp_path / "b.h5") as other:
        assert one.calibration.sequence_sha256 == other.calibration.sequence_sha256
        np.testing.assert_array_equal(one.stacks["encoder"]["lp"], other.stacks["encoder"]["lp"])


def test_builds_on_halves_merge_to_the_whole(tmp_path, vit, capsys):
    arrays = images()
    for name, part in (("one", slice(0, 9)), ("two", slice(9, None)), ("all", slice(None))):
        np.savez(tmp_path / f"{name}.npz", **{key: values[part] for key, values in arrays.items()})
        assert (
            main(
                [
                    "build",
                    str(tmp_path / "vit"),
                    "-o",
                    str(tmp_path / f"{name}.h5"),
                    "--calib",
                    str(tmp_path / f"{name}.npz"),
                    "--quiet",
                ]
            )
            == 0
        )
    assert main(["merge", str(tmp_path / "one.h5"), str(tmp_path / "two.h5"), "-o", str(tmp_path / "sum.h5")]) == 0
    assert main(["validate", str(tmp_path / "sum.h5")]) == 0
    with chanfmt.open(tmp_path / "sum.h5") as merged, chanfmt.open(tmp_path / "all.h5") as whole:
        np.testing.assert_allclose(merged.stacks["encoder"]["sum_q2"], whole.stacks["encoder"]["sum_q2"], rtol=1e-5)
        assert {row.source for row in merged.calibration.contributions} == {"one.npz", "two.npz"}
        assert all(row.inputs for row in merged.calibration.contributions)
    capsys.readouterr()


def test_token_sequences_are_calibrated_on_as_text_is(tmp_path):
    save_tiny(tmp_path / "llama", "llama")
    ids = np.random.default_rng(0).integers(3, 200, (12, 24))
    assert built(tmp_path, "llama", {"input_ids": ids, "attention_mask": np.ones_like(ids)}) == 0
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        assert atlas.calibration.loss == "sum of next-token NLL, nats"
        assert {tuple(row) for row in atlas.calibration.token_ids} == {tuple(row) for row in ids}
    assert built(tmp_path, "llama", {"input_ids": ids}, "--overwrite", "--stream") == 0


def test_a_draw_is_of_different_samples_whatever_their_order(tmp_path):
    arrays = images(10)
    doubled = {name: np.concatenate([values, values[::-1]]) for name, values in arrays.items()}
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", **doubled)
    one, other = (draw_samples(read_inputs(tmp_path / name), 6, 3, seq_len=1, rows=1)[1] for name in ("a.npz", "b.npz"))
    assert len(one) == 6
    assert one.sha256 == other.sha256
    assert [_digest(one.arrays, index) for index in range(6)] == list(one.sha256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_value": images()["pixel_values"]}, "does not take pixel_value; it takes pixel_values, "),
        ({"labels": np.zeros(5, int)}, "different numbers of samples: pixel_values 18, labels 5"),
        ({"pixel_values": np.full((SAMPLES, 3, 16, 16), np.nan, np.float32)}, "pixel_values holds NaN or infinite"),
        ({"pixel_values": images(size=32)["pixel_values"]}, r"cannot run a sample of in.npz \(pixel_values \(3, 32, 32\)"),
        ({"pixel_values": None}, "has no pixel_values, which ViTForImageClassification reads"),
        ({"labels": np.full(SAMPLES, 7)}, "labels run to 7, but ViTForImageClassification has 7 classes"),
        ({"labels": np.full(SAMPLES, -100)}, "labels holds -100"),
        ({"labels": np.zeros(SAMPLES)}, "labels has the type float64"),
        ({"labels": np.zeros((SAMPLES, 3), int)}, "does not give one row of logits for each label"),
        ({"labels": np.array([{}] * SAMPLES)}, "not a readable .npz file of numbers"),
        ({"labels": np.array(["cat"] * SAMPLES)}, "labels has the type <U3"),
        ({"labels": np.array(3)}, "labels is a single number"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, vit, capsys, change, message):
    arrays = {name: values for name, values in (images() | change).items() if values is not None}
    assert built(tmp_path, "vit", arrays) != 0
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "a.h5").exists()


def test_a_model_without_rows_of_states_needs_labels(tmp_path, capsys):
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=7, image_size=16)
    saved(tmp_path / "convnext", config, transformers.ConvNextForImageClassification)
    assert built(tmp_path, "convnext", {"pixel_values": images()["pixel_values"]}) != 0
    said = capsys.readouterr().err
    assert "gives no hidden state per token" in said
    assert "give labels for this model" in said
    assert built(tmp_path, "convnext", images()) == 0


def test_padding_is_refused(tmp_path, whisper, capsys):
    mask = np.ones((SAMPLES, 40), int)
    mask[3, 30:] = 0
    assert built(tmp_path, "whisper", spectra() | {"attention_mask": mask}) != 0
    assert "attention_mask hides part of sample 3; padding would count as tokens" in capsys.readouterr().err


def test_a_decoder_needs_something_to_read(tmp_path, whisper, capsys):
    assert built(tmp_path, "whisper", {"input_features": spectra()["input_features"]}) != 0
    assert "neither labels nor decoder_input_ids" in capsys.readouterr().err
    assert built(tmp_path, "whisper", spectra(), "--loss", "embedding") == 2
    assert "needs decoder_input_ids, which its decoder reads" in capsys.readouterr().err
    given = {"input_features": spectra()["input_features"], "decoder_input_ids": spectra()["labels"]}
    assert built(tmp_path, "whisper", given) == 0
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        assert "last hidden state" in atlas.calibration.loss


def test_what_a_model_draws_at_random_must_be_given(tmp_path, capsys):
    saved(tmp_path / "mae", transformers.ViTMAEConfig(**VIT), transformers.ViTMAEModel)
    assert built(tmp_path, "mae", {"pixel_values": images()["pixel_values"]}) != 0
    said = capsys.readouterr().err
    assert "each time, because it draws random numbers" in said
    assert "noise" in said


def test_convolutions_are_not_ffns(tmp_path, capsys):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=7)
    saved(tmp_path / "resnet", config, transformers.ResNetForImageClassification)
    assert built(tmp_path, "resnet", images()) != 0
    assert "has no FFN that can be measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stream"], "--stream runs token sequences, and in.npz holds labels, pixel_values"),
        (["--calib", "pydoc"], "--calib takes a file of inputs only by itself"),
        (["--loss", "masked-token"], "--loss masked-token needs text"),
    ],
)
def test_what_does_not_go_with_a_file_of_inputs(tmp_path, vit, capsys, more, message):
    assert built(tmp_path, "vit", images(), *more) == 2
    assert message in capsys.readouterr().err


def test_a_text_model_needs_token_ids(tmp_path, capsys):
    save_tiny(tmp_path / "llama", "llama")
    mask = {"position_ids": np.tile(np.arange(8), (SAMPLES, 1))}
    assert built(tmp_path, "llama", mask) == 2
    assert "in.npz has no input_ids, which LlamaForCausalLM reads" in capsys.readouterr().err
    assert built(tmp_path, "llama", {"input_ids": np.full((SAMPLES, 8), 211)}) == 2
    assert "input_ids run from 211 to 211, and the embedding of llama has 211 rows" in capsys.readouterr().err


def test_an_interrupted_build_goes_on_to_the_same_bits(tmp_path, vit, monkeypatch):
    from chanfmt.building.array_losses import LabelsLoss

    assert built(tmp_path, "vit", images(), "--batch-size", "2") == 0
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        expected = atlas.stacks["encoder"]["lp"].tobytes()
    (tmp_path / "a.h5").unlink()
    plain, calls = LabelsLoss.backward, []

    def interrupted(self, batch):
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(self, batch)

    monkeypatch.setattr(LabelsLoss, "backward", interrupted)
    assert built(tmp_path, "vit", images(), "--batch-size", "2", "--checkpoint-every", "0") == 130
    monkeypatch.undo()
    assert built(tmp_path, "vit", images(), "--batch-size", "2", "--resume") == 0
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        assert atlas.stacks["encoder"]["lp"].tobytes() == expected
