"""The tokens of a refit, drawn from text."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from chanfmt.data.shares import divide
from chanfmt.data.sources import draw_text, together
from chanfmt.data.special_tokens import added_by

if TYPE_CHECKING:
    from chanfmt.models.source import ModelSource
    from surgery.recovery.options import Refit


def with_tokens(refit: Refit, source: ModelSource) -> Refit:
    """``refit`` with the tokens of its text, made by the tokenizer of ``source``.

    Raises:
        UsageError: A source cannot be read, or a text is too short.
        ModelError: The model has no tokenizer.
    """
    if refit.text is None:
        return refit
    shares = divide(refit.text.weights, refit.text.sequences)
    special = refit.text.special
    if special is None:
        special = added_by(source.tokenizer, source.id)
    length = refit.text.seq_len
    drawn = [draw_text(name, count, length, 0, model=source, special=special) for name, count in shares.items()]
    sources, tokens = together(drawn)
    return dataclasses.replace(
        refit, tokens=tokens.ids, source_of=tokens.source_of, sources=tuple(item.name for item in sources), text=None
    )
