"""The tokens that a perplexity is measured on, by one of two protocols that published numbers use."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import ModelError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from chanfmt.data.text import Text
    from chanfmt.models.source import ModelSource
    from surgery.evaluation.loaded import LoadedModel


@dataclass(frozen=True)
class Protocol:
    """How a text becomes blocks of tokens. The first token of a block is context only, and no block sees another block.

    Attributes:
        name: As ``--protocol`` takes it.
        empty_rows: Whether empty rows of the source are kept. A blank line joins the rows.
        special_tokens: Whether the tokenizer adds its special tokens, such as BOS, once around the whole text.
        partial_block: Whether the tokens after the last whole block count.
        statement: The protocol in words, for results.
    """

    name: str
    empty_rows: bool
    special_tokens: bool
    partial_block: bool
    statement: str


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "paper",
            empty_rows=False,
            special_tokens=True,
            partial_block=True,
            statement="non-empty rows joined by a blank line, tokenised once with the tokenizer's own special tokens, "
            "non-overlapping blocks, last partial one included, first token of a block not predicted, every predicted token "
            "weighs the same",
        ),
        Protocol(
            "common",
            empty_rows=True,
            special_tokens=False,
            partial_block=False,
            statement="all rows, empty ones too, joined by a blank line, tokenised once without special tokens (no BOS), "
            "non-overlapping blocks, tokens after the last whole one dropped, first token of a block not predicted, every "
            "predicted token weighs the same",
        ),
    )
}


@dataclass(frozen=True, eq=False, repr=False)
class EvaluationTokens:
    """The tokens that a model is evaluated on.

    Attributes:
        ids: Token ids in the order of the text, int32 (token,).
        text_tokens: Number of tokens in the whole text, including those after ``ids``.
        predicted_bytes: UTF-8 bytes of the text that the predicted tokens stand for; None if the tokenizer does not
            record the places of its tokens.
        sha256: SHA-256 of ``ids`` as little-endian int32. Losses on different tokens do not compare.
    """

    ids: np.ndarray
    text_tokens: int
    predicted_bytes: int | None
    sha256: str

    def __repr__(self) -> str:
        return f"<EvaluationTokens: {len(self.ids):,} of {self.text_tokens:,}, SHA-256 {self.sha256[:12]}>"


def evaluation_tokens(tokenizer: Any, text: Text, protocol: Protocol, seq_len: int, max_tokens: int = 0) -> EvaluationTokens:
    """Tokenize ``text`` and choose the tokens that ``protocol`` evaluates.

    Args:
        seq_len: Tokens in a block, at least 2.
        max_tokens: Tokens to use at most; 0 means all.

    Raises:
        UsageError: No token would be predicted.
        ModelError: The tokenizer cannot take the text.
    """
    from chanfmt.data.tokens import tokenize_located

    ids, ends = tokenize_located(tokenizer, text, special=protocol.special_tokens)
    text_tokens = len(ids)
    if max_tokens:
        ids = ids[:max_tokens]
    if not protocol.partial_block:
        if len(ids) < seq_len:
            what = f"--max-tokens {len(ids)} is" if len(ids) < text_tokens else f"{text.source} has {text_tokens} tokens,"
            raise UsageError(
                f"{what} fewer than one block of {seq_len}, and --protocol {protocol.name} uses whole blocks only",
                hint="use a smaller --seq-len, more text, or --protocol paper",
            )
        ids = ids[: len(ids) // seq_len * seq_len]
    if len(ids) < 2:
        raise UsageError(
            f"{text.source} has fewer than two tokens" if len(ids) == text_tokens else "--max-tokens 1 is fewer than two tokens",
            hint="the first one cannot be predicted",
        )
    predicted_bytes = None
    if ends is not None:
        predicted_bytes = sum(
            int(ends[min(start + seq_len, len(ids)) - 1] - ends[start]) for start in range(0, len(ids) - 1, seq_len)
        )
    return EvaluationTokens(ids, text_tokens, predicted_bytes, hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest())


def before_text(model: ModelSource | LoadedModel, seq_len: int) -> tuple[int, ...]:
    """The token ids that the tokenizer of ``model`` puts before a text, such as BOS.

    Empty if that cannot be told, or if the model cannot read them: the protocols do not need these tokens.

    Args:
        seq_len: Tokens in a block, whose first token these tokens replace.
    """
    import numpy as np

    from chanfmt.data.special_tokens import added_by
    from chanfmt.data.tokens import check_context, check_vocabulary

    try:
        before = added_by(model.tokenizer, "the model").before
        check_context(model.config, seq_len + len(before) - 1, "the model")
        check_vocabulary(model.config, model.tokenizer, np.array(before, dtype=np.int64), "the model")
    except (ModelError, UsageError):
        return ()
    return before


def prepare_text(
    name: str, model: ModelSource | LoadedModel, text: Text, protocol: Protocol, seq_len: int, max_tokens: int
) -> EvaluationTokens:
    """Choose the `evaluation_tokens` of ``text`` for a model, and check them against its config. No weight is read.

    Args:
        name: What errors call the model.
        seq_len: Tokens in a block, at least 2.
        max_tokens: Tokens to use at most; 0 means all.

    Raises:
        UsageError: No token would be predicted, or the context of the model is shorter than ``seq_len``.
        ModelError: The model has no tokenizer, or its embedding lacks tokens of the text.
    """
    from chanfmt.data.tokens import check_context, check_vocabulary

    check_context(model.config, seq_len, name)
    tokens = evaluation_tokens(model.tokenizer, text, protocol, seq_len, max_tokens)
    check_vocabulary(model.config, model.tokenizer, tokens.ids, name)
    return tokens
