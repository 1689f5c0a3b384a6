"""What tokenizers put around a text, found by trying them, and what ``--bos`` makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import transformers

from chanfmt.base.errors import ModelError, UsageError
from chanfmt.data.special_tokens import added_by, around_sequences, found_around
from chanfmt.format.records import NO_SPECIAL_TOKENS, SpecialTokens
from tests.support.tiny import tiny_tokenizer, tokenizer_around

PAD, BOS, EOS = 0, 1, 2


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        ("$A", (), ()),
        ("<s> $A", (BOS,), ()),
        ("<s> $A </s>", (BOS,), (EOS,)),
        ("$A </s> <s>", (), (EOS, BOS)),
        ("</s> <s> $A", (EOS, BOS), ()),
    ],
)
def test_the_tokenizer_is_tried_out(template, before, after):
    tokenizer = tokenizer_around(template)
    assert added_by(tokenizer, "m") == SpecialTokens(before, after)


def test_berts_tokenizer_adds_cls_and_sep(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    assert added_by(transformers.BertTokenizer(str(tmp_path / "vocab.txt")), "m") == SpecialTokens((2,), (3,))


def test_a_tokenizer_without_latin_letters_is_tried_with_other_text():
    from tokenizers import Tokenizer, models, processors

    # WordLevel without an unknown token raises over "a".
    bare = Tokenizer(models.WordLevel({"<s>": 0, "的": 1}, unk_token="<none>"))
    bare.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert added_by(transformers.PreTrainedTokenizerFast(tokenizer_object=bare), "m") == SpecialTokens((0,), ())
    empty = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"z": 0}, unk_token="<none>")))
    with pytest.raises(ModelError, match="cannot take the text"):
        added_by(empty, "m")


def test_special_tokens_that_change_the_text_are_refused():
    class Odd(type(tiny_tokenizer())):
        def __call__(self, text, add_special_tokens=True, **options):
            return {"input_ids": [BOS, 5] if add_special_tokens else [7]}

    tokenizer = Odd(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    with pytest.raises(ModelError, match="what the tokenizer of m puts around a text cannot be told"):
        added_by(tokenizer, "m")


@pytest.mark.parametrize(
    ("template", "bos", "expected"),
    [
        ("$A", "auto", NO_SPECIAL_TOKENS),
        ("$A", "always", SpecialTokens((BOS,), ())),
        ("$A", "never", NO_SPECIAL_TOKENS),
        ("<s> $A </s>", "auto", SpecialTokens((BOS,), (EOS,))),
        ("<s> $A </s>", "always", SpecialTokens((BOS,), (EOS,))),
        ("<s> $A </s>", "never", NO_SPECIAL_TOKENS),
        ("$A </s>", "always", SpecialTokens((BOS,), (EOS,))),
    ],
)
def test_what_bos_makes_of_it(template, bos, expected):
    tokenizer = tokenizer_around(template)
    assert around_sequences(tokenizer, added_by(tokenizer, "m"), bos, "m") == expected


def test_always_needs_a_bos():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(UsageError, match="--bos always: the tokenizer of m has no BOS") as caught:
        around_sequences(tokenizer, NO_SPECIAL_TOKENS, "always", "m")
    assert caught.value.hint == "use --bos auto"
    # A tokenizer that puts something else before a text, as BERT's CLS, needs no BOS.
    cls = SpecialTokens((EOS,), ())
    assert around_sequences(tokenizer, cls, "always", "m") == cls
    with pytest.raises(UsageError, match="unknown bos 'alway'; choose from auto, always, never; did you mean always"):
        around_sequences(tokenizer, cls, "alway", "m")


def test_given_sequences_are_looked_at():
    added = SpecialTokens((BOS,), (EOS,))
    ids = np.array([[BOS, 7, 8, EOS], [BOS, 9, 9, EOS]])
    assert found_around(ids, added) == added
    assert found_around(ids[:, :3], added) == SpecialTokens((BOS,), ())
    assert found_around(ids[:, 1:], added) == SpecialTokens((), (EOS,))
    assert found_around(np.array([[BOS, EOS]]), added) == NO_SPECIAL_TOKENS
    assert found_around(ids, NO_SPECIAL_TOKENS) == NO_SPECIAL_TOKENS
