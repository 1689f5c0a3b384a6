"""Sequences that begin and end as the tokenizer begins and ends a text: builds, what they state, and what merges with them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import chanfmt
from chanfmt.algebra.compare import special_tokens_note
from chanfmt.algebra.merge import merge
from chanfmt.algebra.validate import validate
from chanfmt.base.errors import AtlasError, UsageError
from chanfmt.building.options import BuildOptions
from chanfmt.building.series import build_series
from chanfmt.cli.main import main
from chanfmt.format.records import NO_SPECIAL_TOKENS, SpecialTokens
from chanfmt.format.writer import write_atlas
from chanfmt.hub.locate import locate_model
from chanfmt.reporting.trajectory import make_trajectory
from tests.support.builds import SETTINGS, assert_equal, build, request, stop_after
from tests.support.tiny import save_tiny, tokenizer_around
from tests.support.zoo import tiny

BOS, EOS = 1, 2
AROUND = SpecialTokens((BOS,), (EOS,))


@pytest.fixture(scope="module")
def framing(tmp_path_factory):
    """A llama whose tokenizer puts BOS and EOS around a text."""
    directory = save_tiny(tmp_path_factory.mktemp("framing") / "model", "llama")
    tokenizer_around("<s> $A </s>").save_pretrained(directory)
    return directory


def calibration(path):
    with chanfmt.open(path, verify=True) as atlas:
        return atlas.content().calibration


def older(path, target):
    """The atlas as a chanfmt without the record of special tokens would have written it."""
    with chanfmt.open(path) as atlas:
        content = atlas.content()
    stripped = dataclasses.replace(content.calibration, special_tokens=None, tokenizer_special_tokens=None)
    write_atlas(dataclasses.replace(content, calibration=stripped), target)
    return target


@pytest.mark.parametrize("calib", ["pydoc", "self", "rows.jsonl"])
def test_every_sequence_has_them(framing, tmp_path, calib):
    if calib == "rows.jsonl":
        (tmp_path / calib).write_text("\n".join(json.dumps({"text": f"row {number} of many"}) for number in range(200)))
        calib = str(tmp_path / calib)
    path = build(request(framing, tmp_path / "a.h5", calib=calib), SETTINGS)
    found = calibration(path)
    assert found.token_ids.shape == (20, 32)
    assert (found.token_ids[:, 0] == BOS).all()
    assert (found.token_ids[:, -1] == EOS).all()
    assert found.special_tokens == found.tokenizer_special_tokens == AROUND
    assert validate(path) == []


def test_the_text_between_them_has_no_gap(framing, tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij" * 9)
    found = calibration(build(request(framing, tmp_path / "a.h5", calib=str(tmp_path / "a.txt"), seq_len=12), SETTINGS))
    letters = tokenizer_around("$A")("abcdefghij")["input_ids"]
    # Ten letters fit between BOS and EOS, so all blocks are equal.
    assert found.token_ids.tolist() == [[BOS, *letters, EOS]]
    assert found.contributions[0].range == "0:9"


def test_never_and_always(framing, tiny_checkpoint, tmp_path):
    never = calibration(build(request(framing, tmp_path / "never.h5", bos="never"), SETTINGS))
    assert (never.special_tokens, never.tokenizer_special_tokens) == (NO_SPECIAL_TOKENS, AROUND)
    assert not (never.token_ids == BOS).any()
    always = calibration(build(request(tiny_checkpoint("llama"), tmp_path / "always.h5", bos="always"), SETTINGS))
    assert (always.special_tokens, always.tokenizer_special_tokens) == (SpecialTokens((BOS,), ()), NO_SPECIAL_TOKENS)
    assert (always.token_ids[:, 0] == BOS).all()
    own = calibration(build(request(framing, tmp_path / "self.h5", bos="never", calib="self"), SETTINGS))
    assert len(np.unique(own.token_ids[:, 0])) > 1


def test_given_sequences_stay_as_they_are(framing, tmp_path):
    ids = np.random.default_rng(0).integers(3, 100, (6, 16))
    ids[:, 0] = BOS
    np.savez(tmp_path / "ids.npz", input_ids=ids)
    options = request(framing, tmp_path / "a.h5", calib=str(tmp_path / "ids.npz"), sequences=6)
    found = calibration(build(options, SETTINGS))
    assert sorted(found.token_ids.tolist()) == sorted(ids.tolist())
    assert found.special_tokens == SpecialTokens((BOS,), ())
    with pytest.raises(UsageError, match="--bos always has no effect on ids"):
        build(dataclasses.replace(options, bos="always", output=str(tmp_path / "b.h5")), SETTINGS)


def test_masked_tokens_are_between_cls_and_sep(tmp_path):
    tokenizer = tokenizer_around("<s> $A </s>")
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tiny("bert", "masked").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = calibration(build(request(tmp_path / "model", tmp_path / "a.h5"), SETTINGS))
    assert found.special_tokens == AROUND
    assert "hidden by the mask token" in found.loss


def test_streaming_measures_the_same(framing, tmp_path):
    whole, streamed = (
        build(request(framing, tmp_path / f"{name}.h5", stream=name == "streamed"), SETTINGS) for name in ("whole", "streamed")
    )
    with chanfmt.open(whole) as one, chanfmt.open(streamed) as other:
        assert one.calibration.special_tokens == other.calibration.special_tokens == AROUND
        assert one.calibration.sequence_sha256 == other.calibration.sequence_sha256
        for name, stack in one.stacks.items():
            np.testing.assert_allclose(stack["lp"], other.stacks[name]["lp"], rtol=1e-4)


def test_atlases_merge_only_if_their_sequences_begin_alike(framing, tiny_checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text("some other text, and more of it " * 30)
    (tmp_path / "b.txt").write_text("a third text of other words here " * 30)
    made = {}
    for name, model, calib, bos in (
        ("one", framing, "pydoc", "auto"),
        ("two", framing, "a.txt", "auto"),
        ("never", framing, "b.txt", "never"),
        ("plain", tiny_checkpoint("llama"), "pydoc", "auto"),
        ("other", tiny_checkpoint("llama"), "a.txt", "auto"),
        ("always", tiny_checkpoint("llama"), "b.txt", "always"),
    ):
        source = calib if calib == "pydoc" else str(tmp_path / calib)
        made[name] = build(request(model, tmp_path / f"{name}.h5", calib=source, bos=bos, sequences=4), SETTINGS)
    for name in ("one", "plain"):
        made[f"older {name}"] = older(made[name], tmp_path / f"older-{name}.h5")

    def merged(*names):
        atlases = [chanfmt.open(made[name]) for name in names]
        return merge(atlases).calibration

    assert merged("one", "two").special_tokens == AROUND
    for order in (("older plain", "other"), ("other", "older plain")):
        result = merged(*order)
        assert result.special_tokens == result.tokenizer_special_tokens == NO_SPECIAL_TOKENS
    for pair, told in (
        (("one", "never"), "begin and end without special tokens"),
        (("plain", "always"), "begin with 1"),
        (("older one", "two"), "may begin anywhere in a text"),
        (("older one", "never"), "may begin anywhere in a text"),
        (("older plain", "always"), "may begin anywhere in a text"),
    ):
        with pytest.raises(AtlasError, match=f"do not merge: the sequences of one .*{told}") as caught:
            merged(*pair)
        assert "--bos" in caught.value.hint
    with chanfmt.open(made["one"]) as one, chanfmt.open(made["never"]) as never, chanfmt.open(made["two"]) as two:
        assert special_tokens_note(one, two) is None
        note = special_tokens_note(one, never)
        assert note is not None
        assert note.sentence.startswith("the sequences of one begin with 1 and end with 2, and those of the other begin and end")
        assert any("begin and end without" in text for text in make_trajectory([never, one], ["a", "b"]).notes)


def test_an_interrupted_build_continues_only_alike(framing, tiny_checkpoint, tmp_path, monkeypatch):
    whole = build(request(framing, tmp_path / "whole.h5"), SETTINGS)
    options = request(framing, tmp_path / "a.h5", checkpoint_every=0)
    stop_after(options, 2, monkeypatch)
    resumed = dataclasses.replace(options, resume=True)
    with pytest.raises(UsageError, match=r"\(--bos\) was .*before.* and is .*before") as caught:
        build(dataclasses.replace(resumed, bos="never"), SETTINGS)
    assert "sequences changed" not in caught.value.message
    assert_equal(build(resumed, SETTINGS), whole)


def test_a_series_does_not_take_atlases_of_another_bos(tmp_path):
    for seed in (1, 2):
        save_tiny(tmp_path / "run" / f"checkpoint-{seed}", "llama", seed=seed)
        tokenizer_around("<s> $A").save_pretrained(tmp_path / "run" / f"checkpoint-{seed}")
    options = BuildOptions(
        str(tmp_path / "run"), str(tmp_path / "out"), revisions="checkpoint-1", calib="pydoc", sequences=2, seq_len=16
    )
    build_series(options, SETTINGS, locate_model)
    build_series(options, SETTINGS, locate_model)
    build_series(dataclasses.replace(options, bos="always"), SETTINGS, locate_model)
    with pytest.raises(AtlasError, match="was made with another --bos than never: its sequences begin with 1"):
        build_series(dataclasses.replace(options, bos="never"), SETTINGS, locate_model)


def test_info_and_dry_run_say_it(framing, tmp_path, capsys):
    path = build(request(framing, tmp_path / "a.h5"), SETTINGS)
    capsys.readouterr()
    assert main(["info", str(path)]) == 0
    assert "sequences    begin with 1 and end with 2, as a text of this tokenizer does" in capsys.readouterr().out
    assert main(["info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calibration"]["special_tokens"] == {"before": [BOS], "after": [EOS]}
    assert main(["info", str(older(path, tmp_path / "older.h5"))]) == 0
    assert "may begin anywhere in a text: the file is older" in capsys.readouterr().out
    arguments = ["build", str(framing), "-o", str(tmp_path / "b.h5"), "--calib", "pydoc", "--seq-len", "32", "--dry-run"]
    assert main([*arguments, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["begin_with"], summary["end_with"]) == ([BOS], [EOS])
    assert main([*arguments, "--bos", "never"]) == 0
    assert "none" in capsys.readouterr().out
    assert main([*arguments, "--bos", "sometimes"]) == 2
    assert "unknown bos 'sometimes'" in capsys.readouterr().err
