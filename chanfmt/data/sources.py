"""Sequences of one or several sources: drawn separately, measured together, each source with its contribution."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.narrate import say
from chanfmt.base.version import __version__
from chanfmt.data.source import Source
from chanfmt.data.text import read_text
from chanfmt.data.tokens import CalibrationTokens, canonical, check_vocabulary, pack, sample, tokenize, tokenize_documents
from chanfmt.format.records import Contribution

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.data.arrays import CalibrationInputs
    from chanfmt.format.records import ModelRecord, SpecialTokens
    from chanfmt.models.source import ModelSource


def draw_text(source: str, sequences: int, seq_len: int, seed: int, *, model: ModelSource, special: SpecialTokens) -> Source:
    """Draw ``sequences`` sequences of ``seq_len`` tokens from the text of ``source``; all of them if there are fewer.

    Args:
        model: The model whose tokenizer makes the tokens, and whose embedding has to have them.
        special: The tokens that every sequence begins and ends with; they count in ``seq_len``.

    Raises:
        UsageError: The source cannot be read, its text is shorter than one sequence, or ``special`` leaves no place for it.
        ModelError: The tokenizer cannot take the text, or makes a token that the model has no embedding for.
    """
    tokenizer = model.tokenizer
    text = read_text(source, "calibrate")
    if text.documents and tokenizer.eos_token_id is not None:
        token_ids = tokenize_documents(tokenizer, text, special.before)
    else:
        if text.documents:
            say(
                f"note: the tokenizer of {model.id} has no EOS; the documents of {text.source} are joined by a blank line",
            )
        token_ids = tokenize(tokenizer, text)
    check_vocabulary(model.config, tokenizer, np.concatenate([token_ids, special.before, special.after]), model.id)
    blocks = pack(token_ids, seq_len, special, source)
    ids = sample(blocks, sequences, seed).ids
    if len(ids) < sequences:
        say(
            f"note: {text.source} has {len(token_ids)} tokens, {len(ids)} different sequences of {seq_len}, "
            f"not {sequences}; using them all",
        )
    return Source(text.source, text.revision, len(blocks), ids)


def together(sources: Sequence[Source]) -> tuple[tuple[Source, ...], CalibrationTokens]:
    """The sources sorted by name and revision, and all their sequences in canonical order.

    A sequence of several sources counts for the first of them. A note says how many such sequences there are.
    """
    ordered = tuple(sorted(sources, key=lambda source: (source.name, source.revision)))
    counts = [len(source.ids) for source in ordered]
    tokens = canonical(np.concatenate([source.ids for source in ordered]), np.repeat(np.arange(len(ordered)), counts))
    if len(tokens.ids) < sum(counts):
        say(
            f"note: {sum(counts) - len(tokens.ids)} of {sum(counts)} calibration sequences occur twice and are counted once",
        )
    return ordered, tokens


def contributions(
    sources: Sequence[Source], tokens: CalibrationTokens | CalibrationInputs, count: int, model: ModelRecord
) -> tuple[tuple[Contribution, ...], np.ndarray]:
    """The contributions to the first ``count`` sequences, sorted by id, and the row of each sequence, int32 (sequence,)."""
    source_of = tokens.source_of[:count]
    rows = []
    for number, source in enumerate(sources):
        sha256 = [digest for digest, of in zip(tokens.sha256, source_of, strict=False) if of == number]
        if not sha256:
            continue
        # The same measurement has the same id, whoever makes it and in however many runs.
        identity = "\n".join([model.fingerprint, model.config_sha256, model.dtype, *sha256])
        rows.append(
            (
                number,
                Contribution(
                    id=hashlib.sha256(identity.encode()).hexdigest()[:32],
                    source=source.name,
                    revision=source.revision,
                    range=f"0:{source.blocks}",
                    sequences=len(sha256),
                    tokens=len(sha256) * tokens.seq_len,
                    producer=f"chanfmt {__version__}",
                    inputs=source.inputs,
                ),
            )
        )
    rows.sort(key=lambda row: row[1].id)
    position = np.zeros(len(sources), dtype=np.int32)
    for index, (number, _) in enumerate(rows):
        position[number] = index
    return tuple(row for _, row in rows), position[source_of]
