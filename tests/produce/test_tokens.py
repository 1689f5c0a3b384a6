"""Text to blocks: order, duplicates, splits, sources."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from chanfmt.errors import UsageError
from chanfmt.produce import text
from chanfmt.produce.text import read_text
from chanfmt.produce.tokens import canonical, sample, tokenize
from tests.tiny import tiny_tokenizer


def test_canonical_order_is_that_of_the_digests():
    blocks = np.arange(60).reshape(6, 10)
    tokens = canonical(blocks)
    digests = [hashlib.sha256(row.astype("<i4").tobytes()).hexdigest() for row in tokens.ids]
    assert list(tokens.sha256) == sorted(digests) == digests
    assert sorted(map(tuple, tokens.ids.tolist())) == sorted(map(tuple, blocks.tolist()))


@pytest.mark.parametrize("count", [1, 3, 8, 20, 64])
def test_splits_are_equal_runs_and_the_first_is_never_empty(count):
    split_of = canonical(np.arange(count * 4).reshape(count, 4)).split_of.astype(int)
    assert split_of[0] == 0
    assert (np.diff(split_of) >= 0).all()
    sizes = np.bincount(split_of, minlength=8)
    assert sizes.max() - sizes[sizes > 0].min() <= 1


def test_duplicates_are_counted_once():
    ids = np.tile(np.arange(8), 5)
    assert len(sample(ids, 4, 8, 0, "x").ids) == 1
    mixed = np.concatenate([ids, np.arange(100, 180)])
    assert len(sample(mixed, 11, 8, 0, "x").ids) == 11


def test_sample_is_seeded_and_within_the_text():
    ids = np.arange(1000)
    first, again, other = (sample(ids, 10, 16, seed, "x") for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.ids, again.ids)
    assert first.sha256 != other.sha256
    assert (np.diff(first.ids, axis=1) == 1).all()
    assert (first.ids[:, 0] % 16 == 0).all()


def test_text_shorter_than_a_block_is_refused():
    with pytest.raises(UsageError, match="fewer than one sequence"):
        sample(np.arange(5), 1, 8, 0, "x")


def test_rows_are_joined_by_a_blank_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": row}) for row in ["one", "", "  ", "two"]))
    assert read_text(str(path), "calibrate").text == "one\n\ntwo"


def test_parquet_and_text_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["one", None, "two"]}), tmp_path / "a.parquet")
    assert read_text(str(tmp_path / "a.parquet"), "evaluate").text == "one\n\ntwo"
    (tmp_path / "a.txt").write_text("one\n\n\ntwo\n")
    assert read_text(str(tmp_path / "a.txt"), "evaluate").text == "one\n\n\ntwo\n"
    parquet.write_table(pyarrow.table({"body": ["one"]}), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match="no column"):
        read_text(str(tmp_path / "b.parquet"), "evaluate")


def test_pydoc_keeps_text_apart_for_evaluation():
    calibrate, evaluate = (read_text("pydoc", purpose) for purpose in ("calibrate", "evaluate"))
    assert len(calibrate.text) > 100_000
    assert len(evaluate.text) > 30_000
    assert calibrate.revision != evaluate.revision
    paragraphs = [row for row in evaluate.text.split("\n\n") if len(row) > 80]
    assert len(paragraphs) > 50
    assert not [row for row in paragraphs if row in calibrate.text]


def test_long_sources_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MAX_CHARACTERS", 10)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "abcdef"}) for _ in range(9)))
    found = read_text(str(path), "calibrate")
    assert (found.text, found.cut) == ("abcdef\n\nab", True)
    monkeypatch.setattr(text, "MAX_CHARACTERS", 1000)
    assert not read_text(str(path), "calibrate").cut


def test_a_data_set_that_cannot_be_had_says_what_to_do():
    with pytest.raises(Exception, match="data set") as caught:
        read_text("nobody/nothing", "calibrate")
    assert caught.value.hint


def test_tokenize_keeps_special_tokens_of_the_tokenizer():
    ids = tokenize(tiny_tokenizer(), text.Text("x", "", "ab"))
    assert ids.dtype == np.int32
    assert len(ids) == 2
