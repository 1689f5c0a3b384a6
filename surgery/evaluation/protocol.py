"""What a perplexity is measured on: a text's tokens, by one of two protocols that people publish numbers of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from chanfmt.data.text import Text
    from chanfmt.models.source import ModelSource


@dataclass(frozen=True)
class Protocol:
    """How a text becomes blocks. In both the first token of a block is context only, and no block sees another.

    Attributes:
        rows: Which rows the text has; a blank line joins them.
        special_tokens: Whether the tokenizer adds its own (BOS, say) around the whole text, once.
        partial_block: Whether the tokens after the last whole block count.
        statement: All of it in a sentence.
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


@dataclass(frozen=True)
class EvaluationTokens:
    """The tokens that a model is evaluated on.

    Attributes:
        ids: int32 (token,), in the text's order.
        text_tokens: Tokens of the whole text, those beyond ``ids`` too.
        predicted_bytes: UTF-8 bytes of the text that the predicted tokens stand for; None where the tokenizer does
            not keep track.
        sha256: Digest of ``ids`` as little-endian int32; losses with different ones do not compare.
    """

    ids: np.ndarray
    text_tokens: int
    predicted_bytes: int | None
    sha256: str


def evaluation_tokens(tokenizer: Any, text: Text, protocol: Protocol, seq_len: int, max_tokens: int = 0) -> EvaluationTokens:
    """The tokens of ``text`` that ``protocol`` evaluates, the first ``max_tokens`` where that is not 0.

    Raises:
        UsageError: Nothing would be predicted.
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
                f"{what} fewer than one block of {seq_len}, and --protocol {protocol.name} has whole blocks only",
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


def prepare_text(
    name: str, source: ModelSource, text: Text, protocol: Protocol, seq_len: int, max_tokens: int
) -> tuple[Any, EvaluationTokens]:
    """The tokenizer of a model, and `evaluation_tokens` of ``text`` that are checked against its config. No weight is read.

    Raises:
        UsageError: Nothing would be predicted.
        ModelError: The model has no tokenizer, its context is too short, or its embedding lacks tokens.
    """
    from chanfmt.data.tokens import check_context, check_vocabulary

    config, tokenizer = source.config, source.tokenizer
    check_context(config, seq_len, name)
    tokens = evaluation_tokens(tokenizer, text, protocol, seq_len, max_tokens)
    check_vocabulary(config, tokenizer, tokens.ids, name)
    return tokenizer, tokens
