"""Blocks of tokens of equal length and without padding, from text."""

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
    from chanfmt.format.records import SpecialTokens


@dataclass(frozen=True)
class CalibrationTokens:
    """The sequences that a model is measured on, in canonical order.

    Sequences are sorted by their SHA-256, so the numbers in an atlas depend on the set of sequences alone, not on the order
    in which they were drawn.

    Attributes:
        ids: Token ids, int32 (sequence, position).
        sha256: SHA-256 of the little-endian int32 bytes of each sequence, hexadecimal.
        split_of: Split of each sequence, uint8: runs of equal length, split 0 first.
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
        """Rows of one sequence in the FFN with the most rows."""
        return self.seq_len

    def batch(self, start: int, stop: int, model: Any) -> torch.Tensor:
        """Sequences ``start`` to ``stop`` (excluded) as ``model`` and its loss take them."""
        return torch.from_numpy(self.ids[start:stop]).long().to(next(model.parameters()).device)


def tokenize(tokenizer: Any, text: Text) -> np.ndarray:
    """Tokenise all of ``text`` at once, without special tokens. Returns int32 (token,).

    Raises:
        ModelError: The tokenizer cannot take the text.
    """
    return np.asarray(encode(tokenizer, text.text, text.source, special=False)["input_ids"], dtype=np.int32)


def tokenize_located(tokenizer: Any, text: Text, *, special: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
    """Tokenise all of ``text`` at once, and return also the end of each token in the text, in UTF-8 bytes.

    Text that no token covers belongs to the next token, and a character that several tokens share to the first of them.
    Special tokens have no text. The ends are None if the tokenizer does not keep track of them.

    Args:
        special: Whether the tokenizer puts its special tokens around the text.

    Returns:
        Token ids, int32 (token,); and their ends, int64 (token,).

    Raises:
        ModelError: The tokenizer cannot take the text.
    """
    located = bool(getattr(tokenizer, "is_fast", False))
    encoding = encode(tokenizer, text.text, text.source, special=special, return_offsets_mapping=located)
    ids = np.asarray(encoding["input_ids"], dtype=np.int32)
    if not located:
        return ids, None
    characters = np.frombuffer(text.text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + (characters >= 0x80).astype(np.int64) + (characters >= 0x800) + (characters >= 0x10000)
    before = np.concatenate([[0], np.cumsum(sizes)])
    ends = np.fromiter((end for _, end in encoding["offset_mapping"]), dtype=np.int64, count=len(ids))
    return ids, before[np.maximum.accumulate(ends)]


def tokenize_documents(tokenizer: Any, text: Text, before: Sequence[int]) -> np.ndarray:
    """Tokenise the documents of ``text`` one by one, and join them by the tokenizer's EOS. Returns int32 (token,).

    Every document but the first begins with ``before``, and has no other special tokens. If ``before`` begins with an EOS
    itself, as OPT's does, no further EOS joins the documents.

    Args:
        tokenizer: A tokenizer that has an EOS.
        before: Token ids that every sequence begins with, which `pack` puts before the first document.

    Raises:
        ModelError: The tokenizer cannot take the text.
    """
    end = tokenizer.eos_token_id
    between = list(before) if list(before[:1]) == [end] else [end, *before]
    parts: list[np.ndarray] = []
    for document in encode(tokenizer, list(text.documents), text.source, special=False)["input_ids"]:
        parts += [np.asarray(document, dtype=np.int32), np.asarray(between, dtype=np.int32)]
    return np.concatenate(parts[:-1])


def check_context(config: Any, seq_len: int, model: str) -> None:
    """Raise `UsageError` if sequences of ``seq_len`` are longer than the context of ``model``, the name of the model."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    # XLNet's value is -1, which means no limit.
    if limit and 0 < limit < seq_len:
        raise UsageError(f"--seq-len {seq_len} is longer than the context of {model}, {limit}", hint=f"use --seq-len {limit}")


def check_vocabulary(config: Any, tokenizer: Any, token_ids: np.ndarray, model: str) -> None:
    """Raise `ModelError` if ``model`` has no embedding for a token in ``token_ids``. The error names the first such token."""
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
        source_of: Number of the source of each block, int (sequence,); None for a single source. If two blocks are equal, the
            source of the first one counts.
    """
    blocks = np.ascontiguousarray(blocks, dtype="<i4")
    chosen, ordered, split_of = canonical_order([hashlib.sha256(row.tobytes()).hexdigest() for row in blocks])
    source_of = np.zeros(len(blocks)) if source_of is None else source_of
    return CalibrationTokens(blocks[chosen], ordered, split_of, source_of[chosen].astype(np.int32))


def canonical_order(digests: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    """The canonical order of sequences by their digests, without duplicates: indices, digests, and splits."""
    first: dict[str, int] = {}
    for index, digest in enumerate(digests):
        first.setdefault(digest, index)
    ordered = sorted(first)
    split_of = (np.arange(len(ordered)) * schema.SPLITS // max(1, len(ordered))).astype(np.uint8)
    return np.array([first[digest] for digest in ordered], dtype=np.intp), tuple(ordered), split_of


def pack(token_ids: np.ndarray, seq_len: int, special: SpecialTokens, source: str) -> np.ndarray:
    """Cut ``token_ids`` (token,) into blocks of ``seq_len`` tokens, ``special`` among them. Returns (block, position).

    If a block begins where ``special.before`` stands in the text already, between two documents, these tokens are not
    repeated.

    Raises:
        UsageError: The text is shorter than one block, or ``special`` leaves no place for it.
    """
    before, after = (np.asarray(ids, dtype=token_ids.dtype) for ids in (special.before, special.after))
    room = seq_len - len(special)
    if room < 1:
        raise UsageError(
            f"--seq-len {seq_len} leaves no place for text: every sequence has {len(special)} special tokens",
            hint="use a larger --seq-len",
        )
    starts = []
    position = 0
    while position + room <= len(token_ids):
        if len(before) and np.array_equal(token_ids[position : position + len(before)], before):
            position += len(before)
        else:
            starts.append(position)
            position += room
    if not starts:
        raise UsageError(
            f"the text source {source} has {len(token_ids)} tokens, fewer than one sequence of {seq_len}",
            hint="choose a longer text, or a smaller --seq-len",
        )
    inside = token_ids[np.add.outer(starts, np.arange(room))]
    return np.hstack([np.tile(before, (len(starts), 1)), inside, np.tile(after, (len(starts), 1))])


def sample(blocks: np.ndarray, sequences: int, seed: int) -> CalibrationTokens:
    """Draw ``sequences`` of the different ``blocks`` (block, position), without replacement."""
    different = np.unique(blocks, axis=0)
    if sequences < len(different):
        different = different[np.random.default_rng(seed).choice(len(different), sequences, replace=False)]
    return canonical(different)


def encode(tokenizer: Any, text: str | list[str], source: str, *, special: bool, **options: bool) -> Any:
    """The encoding of ``text``, one text or several, by ``tokenizer``. Raises `ModelError`.

    Args:
        source: Name of the text in errors.
        special: Whether the tokenizer puts its special tokens around each text.
        options: Further arguments of the tokenizer.
    """
    try:
        # verbose=False: the text is longer than the model's context on purpose, so transformers need not warn of it.
        return tokenizer(text, add_special_tokens=special, verbose=False, **options)
    # Tokenizers raise errors of any kind, plain Exception among them.
    except Exception as error:
        raise ModelError(
            f"the tokenizer cannot take the text of {source} ({type(error).__name__}: {first_line(error)})",
            hint="save the tokenizer that the model was trained with into its directory",
        ) from None
