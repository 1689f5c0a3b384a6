"""Which tokens an evaluation reads and which bytes they stand for, counted by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import transformers

from chanfmt.base.errors import UsageError
from chanfmt.data.text import Text, read_text
from surgery.evaluation.protocol import PROTOCOLS, evaluation_tokens
from tests.support.tiny import tiny_tokenizer

PAPER, COMMON = PROTOCOLS["paper"], PROTOCOLS["common"]


def text(content: str) -> Text:
    return Text("a.txt", "", content)


def beginning_with_bos() -> transformers.PreTrainedTokenizerFast:
    """One token per character, BOS before a text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def byte_level() -> transformers.PreTrainedTokenizerFast:
    """One token per byte, except " the", as GPT-2's kind does it: offsets without the space before a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "th", "the", "Ġthe"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e"), ("Ġ", "the")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_the_paper_skips_empty_rows_and_the_common_protocol_keeps_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": row}) for row in ["one", "", " two", "  ", "three"]))
    tokenizer = beginning_with_bos()

    def decoded(protocol):
        read = read_text(str(path), "evaluate", empty_rows=protocol.empty_rows)
        return tokenizer.convert_ids_to_tokens(evaluation_tokens(tokenizer, read, protocol, 2).ids.tolist())

    assert decoded(PAPER) == ["<s>", *"one\n\n two\n\nthree"]
    # 22 characters, of which two a block: none is left over.
    assert decoded(COMMON) == list("one\n\n\n\n two\n\n  \n\nthree")


def test_a_text_of_empty_rows_is_empty_under_both(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": ""}\n{"text": " "}\n')
    for protocol in PROTOCOLS.values():
        with pytest.raises(UsageError, match="is empty"):
            read_text(str(path), "evaluate", empty_rows=protocol.empty_rows)


def test_the_tail_counts_for_the_paper_and_is_dropped_by_the_common_protocol():
    tokenizer = tiny_tokenizer()
    paper = evaluation_tokens(tokenizer, text("abcdefghijk"), PAPER, 4)
    common = evaluation_tokens(tokenizer, text("abcdefghijk"), COMMON, 4)
    assert (len(paper.ids), paper.text_tokens) == (11, 11)
    assert (len(common.ids), common.text_tokens) == (8, 11)
    # bcd fgh jk, and bcd fgh.
    assert paper.predicted_bytes == 8
    assert common.predicted_bytes == 6
    assert paper.sha256 != common.sha256
    assert evaluation_tokens(tokenizer, text("abcdefgh"), PAPER, 4).sha256 == common.sha256


def test_max_tokens_comes_before_blocks():
    tokenizer = tiny_tokenizer()
    assert len(evaluation_tokens(tokenizer, text("abcdefghijk"), PAPER, 4, 7).ids) == 7
    assert len(evaluation_tokens(tokenizer, text("abcdefghijk"), COMMON, 4, 7).ids) == 4


def test_bytes_are_those_of_the_predicted_text_and_not_of_bos():
    # BOS begins the first block, so all of "aé" is predicted there; of the second, "😀b", only b.
    found = evaluation_tokens(beginning_with_bos(), text("aé😀b"), PAPER, 3)
    assert len(found.ids) == 5
    assert found.predicted_bytes == len("aé".encode()) + len("b")


def test_a_block_of_one_token_has_no_bytes():
    assert evaluation_tokens(tiny_tokenizer(), text("abcde"), PAPER, 2).predicted_bytes == len("bd")


def test_an_end_of_text_token_stands_for_nothing():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    found = evaluation_tokens(tokenizer, text("abc"), PAPER, 4)
    assert len(found.ids) == 4
    assert found.predicted_bytes == 2


@pytest.mark.parametrize("seq_len", [2, 3, 5, 100])
def test_spaces_that_offsets_leave_out_are_counted(seq_len):
    tokenizer = byte_level()
    content = "of the men, the  the"
    found = evaluation_tokens(tokenizer, text(content), PAPER, seq_len)
    pieces = [tokenizer.decode([token]) for token in found.ids.tolist()]
    assert "".join(pieces) == content
    assert " the" in pieces
    predicted = [piece for index, piece in enumerate(pieces) if index % seq_len]
    assert found.predicted_bytes == sum(len(piece) for piece in predicted)


def test_a_character_of_several_tokens_counts_with_its_first():
    # x, the three bytes of €, y: the second block begins within the character.
    found = evaluation_tokens(byte_level(), text("x€y"), PAPER, 2)
    assert len(found.ids) == 5
    assert found.predicted_bytes == 3
    whole = evaluation_tokens(byte_level(), text("x€y"), PAPER, 8)
    assert whole.predicted_bytes == 4


def test_a_tokenizer_that_keeps_no_track_has_no_bytes(tmp_path):
    # CTRL's tokenizer is written in Python.
    (tmp_path / "vocab.json").write_text(json.dumps({"<unk>": 0, "a": 1, "b": 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    found = evaluation_tokens(tokenizer, text("a b a b"), PAPER, 4)
    assert found.ids.tolist() == [1, 2, 1, 2]
    assert found.predicted_bytes is None


@pytest.mark.parametrize(
    ("protocol", "seq_len", "max_tokens", "message"),
    [
        (COMMON, 12, 0, "a.txt has 11 tokens, fewer than one block of 12, and --protocol common uses whole blocks only"),
        (COMMON, 8, 7, "--max-tokens 7 is fewer than one block of 8"),
        (PAPER, 8, 1, "--max-tokens 1 is fewer than two tokens"),
    ],
)
def test_too_little_text_is_refused(protocol, seq_len, max_tokens, message):
    with pytest.raises(UsageError, match=message):
        evaluation_tokens(tiny_tokenizer(), text("abcdefghijk"), protocol, seq_len, max_tokens)


def test_a_text_of_one_token_is_refused():
    with pytest.raises(UsageError, match=r"a\.txt has fewer than two tokens"):
        evaluation_tokens(tiny_tokenizer(), text("a"), PAPER, 8)


def test_statements_say_what_differs():
    for protocol in PROTOCOLS.values():
        assert ("empty ones too" in protocol.statement) == protocol.empty_rows
        assert ("no BOS" in protocol.statement) == (not protocol.special_tokens)
        assert ("last partial one included" in protocol.statement) == protocol.partial_block


def test_ids_are_the_tokenizers_own():
    tokenizer = beginning_with_bos()
    found = evaluation_tokens(tokenizer, text("some text"), PAPER, 4)
    assert found.ids.dtype == np.int32
    assert found.ids.tolist() == tokenizer("some text")["input_ids"]
