"""Several sources in one build: shares, contributions, splits, order, merging, continuing."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest

import chanfmt
from chanfmt.algebra.merge import merge
from chanfmt.base.errors import AtlasError, UsageError
from chanfmt.building.options import BuildOptions
from chanfmt.cli.main import main
from chanfmt.data.source import Source
from chanfmt.data.sources import together
from chanfmt.format.records import LabelSettings
from tests.support.builds import assert_equal, build, stop_after
from tests.support.heard import heard
from tests.support.tiny import save_tiny, tiny_tokenizer

SETTINGS = LabelSettings(rho=0.03, support_size=8)
SEQ_LEN = 32


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two files of random words: 40 and 10 blocks of the tiny tokenizer."""
    directory, generator = tmp_path_factory.mktemp("texts"), random.Random(3)
    paths = []
    for name, blocks in (("a", 40), ("b", 10)):
        paths.append(directory / f"{name}.txt")
        paths[-1].write_text("".join(generator.choices("abcdefgh   \n", k=blocks * SEQ_LEN)))
    return tuple(map(str, paths))


def request(model, output, calib, **changes):
    values = {"calib": calib, "sequences": 20, "seq_len": SEQ_LEN, "batch_size": "4"} | changes
    return BuildOptions(str(model), str(output), **values)


def calibration(path):
    with chanfmt.open(path, verify=True) as atlas:
        return atlas.content().calibration


def test_every_source_has_its_contribution(tiny_checkpoint, texts, tmp_path, capsys):
    first, second = texts
    path = build(request(tiny_checkpoint("llama"), tmp_path / "a.h5", (f"{first}=3", second)), SETTINGS)
    assert main(["validate", str(path)]) == 0
    found = calibration(path)
    rows = {row.source: row for row in found.contributions}
    assert {name: (row.range, row.sequences, row.tokens) for name, row in rows.items()} == {
        "a.txt": ("0:40", 15, 480),
        "b.txt": ("0:10", 5, 160),
    }
    assert [row.id for row in found.contributions] == sorted(row.id for row in found.contributions)
    assert len({row.revision for row in rows.values()}) == 2
    assert list(found.sequence_sha256) == sorted(found.sequence_sha256)
    for ids, number in zip(found.token_ids, found.source_of, strict=True):
        text = Path(texts[found.contributions[number].source == "b.txt"]).read_text()
        position = text.index("".join(tiny_tokenizer().convert_ids_to_tokens(ids)))
        assert position % SEQ_LEN == 0


def test_the_order_of_the_sources_changes_nothing(tiny_checkpoint, texts, tmp_path):
    one, other = (
        build(request(tiny_checkpoint("llama"), tmp_path / f"{name}.h5", calib), SETTINGS)
        for name, calib in (("one", texts), ("other", texts[::-1]))
    )
    assert_equal(one, other)


def test_a_source_alone_is_measured_as_within_others(tiny_checkpoint, texts, tmp_path):
    """A source's sequences and id are those of a build on this source alone, with its share of the sequences."""
    both = calibration(build(request(tiny_checkpoint("llama"), tmp_path / "a.h5", texts), SETTINGS))
    alone = calibration(build(request(tiny_checkpoint("llama"), tmp_path / "b.h5", texts[0], sequences=10), SETTINGS))
    (row,) = alone.contributions
    assert row in both.contributions
    number = both.contributions.index(row)
    assert [digest for digest, of in zip(both.sequence_sha256, both.source_of, strict=True) if of == number] == list(
        alone.sequence_sha256
    )


def test_merged_builds_hold_the_contributions_of_a_build_of_all(tiny_checkpoint, texts, tmp_path):
    paths = [
        build(request(tiny_checkpoint("llama"), tmp_path / f"{name}.h5", calib, sequences=count), SETTINGS)
        for name, calib, count in (("a", texts[0], 10), ("b", texts[1], 10), ("c", "pydoc", 10), ("ab", texts, 20))
    ]
    atlases = [chanfmt.open(path) for path in paths]
    merged, whole = merge(atlases[:2]), atlases[3].content()
    for field in ("sequence_sha256", "contributions", "source_of", "token_ids"):
        np.testing.assert_array_equal(getattr(merged.calibration, field), getattr(whole.calibration, field))
    np.testing.assert_allclose(merged.stacks[0].variables["lp"], whole.stacks[0].variables["lp"], rtol=1e-5)
    three, again = merge([atlases[3], atlases[2]]), merge([atlases[2], atlases[3]])
    assert [row.source for row in sorted(three.calibration.contributions, key=lambda row: row.source)] == [
        "a.txt",
        "b.txt",
        "pydoc/calibrate",
    ]
    assert three.calibration.contributions == again.calibration.contributions
    with pytest.raises(AtlasError, match="both hold the contribution"):
        merge([atlases[3], atlases[0]])
    for atlas in atlases:
        atlas.close()


def test_an_interrupted_build_of_several_sources_continues(tiny_checkpoint, texts, tmp_path, monkeypatch):
    calib = (*texts, "self")
    whole = build(request(tiny_checkpoint("llama"), tmp_path / "whole.h5", calib), SETTINGS)
    options = request(tiny_checkpoint("llama"), tmp_path / "a.h5", calib, checkpoint_every=0)
    stop_after(options, 1, monkeypatch, SETTINGS)
    assert main(["validate", str(options.partial)]) == 0
    resumed = dataclasses.replace(options, resume=True)
    for changed, message in ((texts, "--calib was .*7 of a.txt.* and is 10 of a.txt"), ((*texts, "self=3"), "--calib was ")):
        with pytest.raises(UsageError, match=message):
            build(dataclasses.replace(resumed, calib=changed), SETTINGS)
    assert_equal(build(dataclasses.replace(resumed, calib=calib[::-1]), SETTINGS), whole)


def test_a_source_that_is_not_yet_measured_is_not_listed(tiny_checkpoint, texts, tmp_path, monkeypatch):
    options = request(
        tiny_checkpoint("llama"), tmp_path / "a.h5", (f"{texts[0]}=19", texts[1]), checkpoint_every=0, batch_size="1"
    )
    stop_after(options, 1, monkeypatch, SETTINGS)
    assert main(["validate", str(options.partial)]) == 0
    found = calibration(options.partial)
    assert (found.sequences, len(found.contributions)) == (1, 1)


def test_splits_mix_the_sources():
    generator = np.random.default_rng(0)
    parts = [
        Source(name, "", count, generator.integers(0, 100, (count, 16), dtype=np.int32))
        for name, count in (("a", 384), ("b", 128))
    ]
    _, tokens = together(parts)
    assert (np.bincount(tokens.split_of) == 64).all()
    shares = np.array([np.bincount(tokens.source_of[tokens.split_of == split], minlength=2) for split in range(8)])
    # Drawn without replacement: mean 16, deviation 3.2.
    assert (abs(shares[:, 1] - 16) < 10).all()
    assert shares.sum(0).tolist() == [384, 128]


def test_a_sequence_of_two_sources_counts_once():
    ids = np.arange(64, dtype=np.int32).reshape(4, 16)
    parts = [Source("b", "", 3, ids[1:]), Source("a", "", 2, ids[:2])]
    for order in (parts, parts[::-1]):
        with heard() as said:
            sources, tokens = together(order)
        assert "1 of 5 calibration sequences occur twice" in "\n".join(said)
        assert [source.name for source in sources] == ["a", "b"]
        assert {int(row[0]): int(of) for row, of in zip(tokens.ids, tokens.source_of, strict=True)} == {0: 0, 16: 0, 32: 1, 48: 1}


def test_one_text_under_two_names_is_one_contribution(tiny_checkpoint, texts, tmp_path):
    (tmp_path / "copy.txt").write_bytes(Path(texts[1]).read_bytes())
    path = build(request(tiny_checkpoint("llama"), tmp_path / "a.h5", (texts[1], str(tmp_path / "copy.txt"))), SETTINGS)
    assert main(["validate", str(path)]) == 0
    (row,) = calibration(path).contributions
    assert (row.source, row.sequences) == ("b.txt", 10)


def test_self_is_sampled_from_the_model(tiny_checkpoint, tmp_path, capsys):
    paths = [
        build(request(tiny_checkpoint("llama"), tmp_path / f"{name}.h5", "self", seed=seed), SETTINGS)
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    ]
    assert main(["validate", *map(str, paths)]) == 0
    one, again, other = map(calibration, paths)
    assert_equal(paths[0], paths[1])
    (row,) = one.contributions
    assert (row.source, row.range, row.sequences) == ("self", "0:20", 20)
    assert row == again.contributions[0]
    assert row.revision != other.contributions[0].revision
    assert (one.token_ids[:, 0] == 1).all()
    atlases = [chanfmt.open(path) for path in (paths[0], paths[2])]
    assert merge(atlases).calibration.sequences == 40
    for atlas in atlases:
        atlas.close()


def test_a_dry_run_samples_nothing(tiny_checkpoint, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("chanfmt.data.sampled._pick", None)
    for calib, sources, tokens in ((("self",), ["self"], 640), (("self=3", texts[0]), ["a.txt", "self"], 640)):
        arguments = [item for source in calib for item in ("--calib", source)]
        assert (
            main(
                [
                    "build",
                    str(tiny_checkpoint("llama")),
                    "-o",
                    str(tmp_path / "a.h5"),
                    *arguments,
                    "--sequences",
                    "20",
                    "--seq-len",
                    "32",
                    "--dry-run",
                    "--json",
                ]
            )
            == 0
        )
        summary = json.loads(capsys.readouterr().out)
        assert (summary["calibration"], summary["sequences"], summary["tokens"]) == (sources, 20, tokens)


def refusal(capsys, *arguments):
    code = main([str(item) for item in arguments])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return code, error


def test_too_short_a_text_says_how_much_there_is(tiny_checkpoint, texts, tmp_path, capsys):
    arguments = ["build", tiny_checkpoint("llama"), "-o", tmp_path / "a.h5", "--seq-len", "32", "--calib", texts[1]]
    code, error = refusal(capsys, *arguments)
    assert code == 0
    assert "note: b.txt has 320 tokens, 10 different sequences of 32, not 64; using them all" in error
    (tmp_path / "short.txt").write_text("abc")
    code, error = refusal(capsys, *arguments[:4], "--overwrite", *arguments[4:], "--calib", tmp_path / "short.txt")
    assert code == 2
    assert "has 3 tokens, fewer than one sequence of 32" in error


def save_documents(path, rows=200):
    generator = random.Random(1)
    rows = ["".join(generator.choices("abcdefgh ", k=generator.randrange(5, 60))) for _ in range(rows)]
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return path


def test_a_tokenizer_without_eos_joins_documents_by_a_blank_line(tmp_path, capsys):
    directory = save_tiny(tmp_path / "m", "llama")
    path = save_documents(tmp_path / "d.jsonl")
    command = ["build", directory, "--calib", path, "--seq-len", "32", "--sequences", "8", "-o"]
    assert refusal(capsys, *command, tmp_path / "with.h5")[0] == 0
    assert (calibration(tmp_path / "with.h5").token_ids == 2).any()
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.bos_token = None
    tokenizer.save_pretrained(directory)
    code, error = refusal(capsys, *command, tmp_path / "without.h5")
    assert code == 0
    assert "note: the tokenizer of m has no EOS; the documents of d.jsonl are joined by a blank line" in error
    ids = calibration(tmp_path / "without.h5").token_ids
    assert not (ids == 2).any()
    newline = tokenizer.convert_tokens_to_ids("\n")
    assert ((ids[:, 1:] == newline) & (ids[:, :-1] == newline)).any()
    assert refusal(capsys, *command[:2], "--calib", "self", *command[4:], tmp_path / "self.h5")[0] == 0


@pytest.mark.parametrize("calib", ["d.jsonl", "self"])
def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path, capsys, calib):
    directory = save_tiny(tmp_path / "m", "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<new{index}>" for index in range(120)])
    tokenizer.eos_token = tokenizer.bos_token = "<new119>"
    tokenizer.save_pretrained(directory)
    source = save_documents(tmp_path / calib) if calib != "self" else calib
    code, error = refusal(capsys, "build", directory, "-o", tmp_path / "a.h5", "--calib", source, "--seq-len", "32")
    assert code == 2
    assert "'<new119>', lies beyond the 211 rows of its embedding" in error
    assert not (tmp_path / "a.h5").exists()


def test_surgery_eval_has_no_self(tiny_checkpoint, capsys):
    from surgery.cli.main import main as surgery

    assert surgery(["eval", str(tiny_checkpoint("llama")), "--data", "self"]) == 2
    assert "every model would be measured on another text" in capsys.readouterr().err
