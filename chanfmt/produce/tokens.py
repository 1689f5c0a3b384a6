"""Text to equal, unpadded blocks of tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt import schema
from chanfmt.errors import UsageError

if TYPE_CHECKING:
    from chanfmt.produce.text import Text


@dataclass(frozen=True)
class CalibrationTokens:
    """The sequences a model is measured on, in canonical order.

    Sequences are sorted by their SHA-256: the numbers in an atlas depend on the set of sequences
    alone, not on the order a sampler drew them in.

    Attributes:
        ids: Token ids, int32 (sequence, position).
        sha256: Digest of each sequence's little-endian int32 bytes.
        split_of: Split of each sequence, uint8; equal runs, split 0 first.
    """

    ids: np.ndarray
    sha256: tuple[str, ...]
    split_of: np.ndarray


def tokenize(tokenizer: Any, text: Text) -> np.ndarray:
    """All of ``text`` as token ids, int32 (token,), with the tokenizer's own special tokens."""
    # verbose=False: a warning that the text is longer than the model's context is no news here.
    return np.asarray(tokenizer(text.text, verbose=False)["input_ids"], dtype=np.int32)


def check_fits(config: Any, token_ids: np.ndarray, seq_len: int, model: str) -> None:
    """Raise `UsageError` where ``model`` cannot take sequences of ``seq_len``, or ids of its tokenizer."""
    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    if limit and seq_len > limit:
        raise UsageError(
            f"--seq-len {seq_len} is longer than the context of {model}, {limit}", hint=f"use --seq-len {limit}"
        )
    if len(token_ids) and token_ids.max() >= text_config.vocab_size:
        raise UsageError(f"{model}: its tokenizer has ids beyond its vocabulary of {text_config.vocab_size}")


def canonical(blocks: np.ndarray) -> CalibrationTokens:
    """``blocks`` (sequence, position) without duplicates, in canonical order, with their splits."""
    blocks = np.ascontiguousarray(blocks, dtype="<i4")
    digests = {hashlib.sha256(row.tobytes()).hexdigest(): index for index, row in enumerate(blocks)}
    ordered = sorted(digests)
    split_of = (np.arange(len(ordered)) * schema.SPLITS // len(ordered)).astype(np.uint8)
    return CalibrationTokens(blocks[[digests[digest] for digest in ordered]], tuple(ordered), split_of)


def sample(token_ids: np.ndarray, sequences: int, seq_len: int, seed: int, source: str) -> CalibrationTokens:
    """``sequences`` of the different packed blocks of ``token_ids``, drawn without replacement.

    Raises:
        UsageError: The text has not a single whole block.
    """
    available = len(token_ids) // seq_len
    if available == 0:
        raise UsageError(
            f"the text source {source} has {len(token_ids)} tokens, fewer than one sequence of {seq_len}",
            hint="choose a longer text, or a smaller --seq-len",
        )
    different = np.unique(token_ids[: available * seq_len].reshape(available, seq_len), axis=0)
    if sequences < len(different):
        different = different[np.random.default_rng(seed).choice(len(different), sequences, replace=False)]
    return canonical(different)
