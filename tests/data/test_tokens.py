"""Text to blocks: order, duplicates, splits, sources."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from chanfmt.base.errors import ModelError, UsageError
from chanfmt.data import text
from chanfmt.data.special_tokens import added_by
from chanfmt.data.text import read_text
from chanfmt.data.tokens import canonical, check_context, check_vocabulary, pack, sample, tokenize, tokenize_documents
from chanfmt.format.records import SpecialTokens
from tests.support.tiny import tiny_model, tiny_tokenizer, tokenizer_around

PAD, BOS, EOS = 0, 1, 2


def documents(*rows):
    return text.Text("x", "", "\n\n".join(rows), rows)


def packed(ids, seq_len, before=(), after=()):
    return pack(ids, seq_len, SpecialTokens(before, after), "x")


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
    assert len(sample(packed(ids, 8), 4, 0).ids) == 1
    mixed = np.concatenate([ids, np.arange(100, 180)])
    assert len(sample(packed(mixed, 8), 11, 0).ids) == 11


def test_sample_is_seeded_and_within_the_text():
    ids = np.arange(1000)
    first, again, other = (sample(packed(ids, 16), 10, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.ids, again.ids)
    assert first.sha256 != other.sha256
    assert (np.diff(first.ids, axis=1) == 1).all()
    assert (first.ids[:, 0] % 16 == 0).all()


def test_text_shorter_than_a_block_is_refused():
    with pytest.raises(UsageError, match="fewer than one sequence"):
        packed(np.arange(5), 8)
    with pytest.raises(UsageError, match="fewer than one sequence"):
        packed(np.arange(5), 10, (1,), (2, 3, 4))


def test_every_block_has_the_special_tokens_around_text():
    blocks = packed(np.arange(10, 24), 7, (BOS,), (EOS, PAD))
    assert blocks.tolist() == [[BOS, *range(start, start + 4), EOS, PAD] for start in (10, 14, 18)]
    assert packed(np.arange(10), 5).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_a_block_that_begins_with_a_document_has_one_bos():
    joined = np.array([10, 11, 12, 13, EOS, 14, EOS, BOS, 15, 16, 17, EOS, BOS, 18])
    assert packed(joined, 8, (BOS,)).tolist() == [[BOS, 10, 11, 12, 13, EOS, 14, EOS]]
    assert packed(joined, 4, (BOS,)).tolist() == [[BOS, 10, 11, 12], [BOS, 13, EOS, 14], [BOS, EOS, BOS, 15], [BOS, 16, 17, EOS]]
    # OPT begins a text with its EOS. The EOS between two documents is then the one that begins the block.
    assert packed(np.array([10, 11, EOS, 12, 13, EOS, 14]), 3, (EOS,)).tolist() == [[EOS, 10, 11], [EOS, 12, 13]]


def test_special_tokens_without_place_for_text_are_refused():
    with pytest.raises(UsageError, match="--seq-len 3 leaves no place for text: every sequence has 3 special tokens"):
        packed(np.arange(50), 3, (BOS,), (EOS, PAD))


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
    assert (found.text, found.documents, found.cut) == ("abcdef\n\nab", ("abcdef", "ab"), True)
    # The row has nine characters, and the blank line behind it reaches beyond the limit.
    path.write_text("\n".join(json.dumps({"text": "abcdefghi"}) for _ in range(2)))
    found = read_text(str(path), "calibrate")
    assert (found.text, found.documents, found.cut) == ("abcdefghi", ("abcdefghi",), True)
    monkeypatch.setattr(text, "MAX_CHARACTERS", 1000)
    assert not read_text(str(path), "calibrate").cut


def test_a_data_set_that_cannot_be_had_says_what_to_do():
    with pytest.raises(Exception, match="data set") as caught:
        read_text("nobody/nothing", "calibrate")
    assert caught.value.hint


def test_tokenize_gives_int32():
    ids = tokenize(tiny_tokenizer(), text.Text("x", "", "ab"))
    assert ids.dtype == np.int32
    assert len(ids) == 2


def test_rows_are_documents_in_files_of_records_only(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    assert read_text(str(tmp_path / "a.txt"), "calibrate").documents == ()
    assert read_text("pydoc", "calibrate").documents == ()
    assert read_text(str(tmp_path / "a.jsonl"), "calibrate").documents == ("one", "two")


@pytest.mark.parametrize(
    ("template", "before", "between"),
    [
        ("$A", [], [EOS]),
        ("<s> $A", [BOS], [EOS, BOS]),
        ("<s> $A </s>", [BOS], [EOS, BOS]),
        ("$A </s>", [], [EOS]),
        ("</s> $A", [EOS], [EOS]),
    ],
)
def test_documents_are_joined_by_eos_and_begin_as_a_text_does(template, before, between):
    tokenizer = tokenizer_around(template)
    one, two, three = (tiny_tokenizer()(row)["input_ids"] for row in ("one", "two two", "a"))
    added = added_by(tokenizer, "m")
    assert list(added.before) == before
    ids = tokenize_documents(tokenizer, documents("one", "two two", "a"), added.before)
    assert ids.dtype == np.int32
    # The first document begins with the block.
    assert ids.tolist() == [*one, *between, *two, *between, *three]
    bare = tokenize_documents(tokenizer, documents("one", "a"), ())
    assert bare.tolist() == [*one, EOS, *three]


def test_a_text_has_no_special_tokens_of_its_own():
    ids = tokenize(tokenizer_around("<s> $A </s>"), documents("ab", "c"))
    assert ids.tolist() == tiny_tokenizer()("ab\n\nc")["input_ids"]


def test_a_tokenizer_that_fails_is_reported():
    tokenizer = tiny_tokenizer()
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    bare = Tokenizer(models.WordLevel({"a": 0}, unk_token="<none>"))
    bare.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    broken = type(tokenizer)(tokenizer_object=bare)
    with pytest.raises(ModelError, match="cannot take the text of x"):
        tokenize(broken, text.Text("x", "", "ab"))


def test_a_token_beyond_the_embedding_is_named():
    config = tiny_model("llama").config
    tokenizer = tiny_tokenizer()
    check_vocabulary(config, tokenizer, np.array([0, 210]), "m")
    tokenizer.add_tokens([f"<new{index}>" for index in range(120)])
    first = len(tokenizer) - 1
    with pytest.raises(ModelError) as caught:
        check_vocabulary(config, tokenizer, np.array([5, first, first - 1, 7, first]), "m")
    assert caught.value.message == (
        f"m: token {first} of its tokenizer, '<new119>', lies beyond the 211 rows of its embedding, "
        "and so do 3 of 5 tokens of the text"
    )


def test_a_sequence_longer_than_the_context_is_refused():
    config = tiny_model("gpt2").config
    check_context(config, 128, "m")
    with pytest.raises(UsageError, match="--seq-len 129 is longer than the context of m, 128"):
        check_context(config, 129, "m")


def test_self_is_not_a_text():
    with pytest.raises(UsageError, match="every model would be measured on another text"):
        read_text("self", "evaluate")


@pytest.mark.parametrize(
    ("source", "name", "documents"),
    [
        ("c4", "allenai/c4/en/train", True),
        ("a/b:c@d", "a/b/c/d", True),
        ("wikitext2", "Salesforce/wikitext/wikitext-2-raw-v1/train", False),
        ("Salesforce/wikitext:wikitext-103-raw-v1", "Salesforce/wikitext/wikitext-103-raw-v1/train", False),
    ],
)
def test_rows_of_data_sets_are_documents_except_wikitexts(source, name, documents):
    found, _, are_documents = text._dataset_rows(source, "calibrate")
    assert (found, are_documents) == (name, documents)
