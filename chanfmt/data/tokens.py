"""Text to equal, unpadded blocks of tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from chanfmt.base.errors import ModelError, UsageError, first_line
from chanfmt.format import schema

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.data.text import Text


@dataclass(frozen=True)
class CalibrationTokens:
    """The sequences a model is measured on, in canonical order.

    Sequences are sorted by their SHA-256: the numbers in an atlas depend on the set of sequences
    alone, not on the order a sampler drew them in.

    Attributes:
        ids: Token ids, int32 (sequence, position).
        sha256: Digest of each sequence's little-endian int32 bytes.
        split_of: Split of each sequence, uint8; equal runs, split 0 first.
        source_of: Number of the source of each sequence, int32.
    """

    ids: np.ndarray
    sha256: tuple[str, ...]
    split_of: np.ndarray
    source_of: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def seq_len(self) -> int:
        """Tokens in a sequence."""
        return int(self.ids.shape[1])

    @property
    def rows(self) -> int:
        """Rows that a sequence is to the FFN that sees most."""
        return self.seq_len

    def batch(self, start: int, stop: int, model: Any) -> torch.Tensor:
        """Sequences ``start`` to ``stop`` (excluded) as ``model`` and its loss take them."""
        return torch.from_numpy(self.ids[start:stop]).long().to(next(model.parameters()).device)


def tokenize(tokenizer: Any, text: Text) -> np.ndarray:
    """All of ``text`` as one, with the special tokens that the tokenizer puts around a text; int32 (token,).

    Raises:
        ModelError: The tokenizer cannot take the text.
    """
    return np.asarray(_encoded(tokenizer, text.text, text.source, special=True)["input_ids"], dtype=np.int32)


def tokenize_located(tokenizer: Any, text: Text, *, special: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
    """As `tokenize`, with where each token ends: UTF-8 bytes from the beginning of the text, int64 (token,).

    What no token covers belongs to the next one, a character that several share to the first of them, and to a
    special token nothing. None instead where the tokenizer does not keep track.

    Args:
        special: Whether to add special tokens at all.

    Raises:
        ModelError: The tokenizer cannot take the text.
    """
    located = bool(getattr(tokenizer, "is_fast", False))
    encoding = _encoded(tokenizer, text.text, text.source, special=special, return_offsets_mapping=located)
    ids = np.asarray(encoding["input_ids"], dtype=np.int32)
    if not located:
        return ids, None
    characters = np.frombuffer(text.text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + (characters >= 0x80).astype(np.int64) + (characters >= 0x800) + (characters >= 0x10000)
    before = np.concatenate([[0], np.cumsum(sizes)])
    ends = np.fromiter((end for _, end in encoding["offset_mapping"]), dtype=np.int64, count=len(ids))
    return ids, before[np.maximum.accumulate(ends)]


def tokenize_documents(tokenizer: Any, text: Text) -> np.ndarray:
    """The documents of ``text`` one by one, joined by the tokenizer's EOS; int32 (token,).

    Every document begins with what the tokenizer puts before a text (its BOS, two tokens, or nothing), and is
    otherwise without special tokens. Where that beginning is an EOS itself, as OPT's is, it is what joins.

    Args:
        tokenizer: One that has an EOS.

    Raises:
        ModelError: The tokenizer cannot take the text.
    """
    end = tokenizer.eos_token_id
    before = _beginning(tokenizer)
    between = before if before[:1] == [end] else [end, *before]
    parts = [np.asarray(before, dtype=np.int32)]
    for document in _encoded(tokenizer, list(text.documents), text.source, special=False)["input_ids"]:
        parts += [np.asarray(document, dtype=np.int32), np.asarray(between, dtype=np.int32)]
    return np.concatenate(parts[:-1])


def check_context(config: Any, seq_len: int, model: str) -> None:
    """Raise `UsageError` where ``model`` cannot take sequences of ``seq_len``."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    # XLNet says -1: no limit.
    if limit and 0 < limit < seq_len:
        raise UsageError(f"--seq-len {seq_len} is longer than the context of {model}, {limit}", hint=f"use --seq-len {limit}")


def check_vocabulary(config: Any, tokenizer: Any, token_ids: np.ndarray, model: str) -> None:
    """Raise `ModelError` naming a token of ``token_ids`` that ``model`` has no embedding for."""
    rows = config.get_text_config().vocab_size
    beyond = token_ids[token_ids >= rows]
    if len(beyond):
        first = int(beyond[0])
        raise ModelError(
            f"{model}: token {first} of its tokenizer, {tokenizer.convert_ids_to_tokens(first)!r}, lies beyond the "
            f"{rows} rows of its embedding, and so do {len(beyond)} of {len(token_ids)} tokens of the text",
            hint="save the model with the tokenizer it was trained with, or with model.resize_token_embeddings",
        )


def canonical(blocks: np.ndarray, source_of: np.ndarray | None = None) -> CalibrationTokens:
    """``blocks`` (sequence, position) without duplicates, in canonical order, with their splits.

    Args:
        source_of: Number of each block's source, int (sequence,); None for a single source. Of two equal
            blocks the first one's counts.
    """
    blocks = np.ascontiguousarray(blocks, dtype="<i4")
    chosen, ordered, split_of = canonical_order([hashlib.sha256(row.tobytes()).hexdigest() for row in blocks])
    source_of = np.zeros(len(blocks)) if source_of is None else source_of
    return CalibrationTokens(blocks[chosen], ordered, split_of, source_of[chosen].astype(np.int32))


def canonical_order(digests: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    """The canonical order of sequences by their digests, each digest's first: indices, digests, and splits."""
    first: dict[str, int] = {}
    for index, digest in enumerate(digests):
        first.setdefault(digest, index)
    ordered = sorted(first)
    split_of = (np.arange(len(ordered)) * schema.SPLITS // max(1, len(ordered))).astype(np.uint8)
    return np.array([first[digest] for digest in ordered], dtype=np.intp), tuple(ordered), split_of


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


def _encoded(tokenizer: Any, text: str | list[str], source: str, *, special: bool, **options: bool) -> Any:
    """What ``tokenizer`` makes of ``text``, one or several."""
    try:
        # verbose=False: a warning that a text is longer than the model's context is no news here.
        return tokenizer(text, add_special_tokens=special, verbose=False, **options)
    # Tokenizers raise what they like, plain Exception among it.
    except Exception as error:
        raise ModelError(
            f"the tokenizer cannot take the text of {source} ({type(error).__name__}: {first_line(error)})",
            hint="save the tokenizer that the model was trained with into its directory",
        ) from None


def _beginning(tokenizer: Any) -> list[int]:
    """What ``tokenizer`` puts before a text."""
    # Asked of the tokenizer at work: add_bos_token says it for some classes only.
    with_special, without = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_special) - len(without) + 1):
        if with_special[start : start + len(without)] == without:
            return list(with_special[:start])
    return []
