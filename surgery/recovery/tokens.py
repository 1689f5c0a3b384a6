"""The tokens of a refit, drawn from text."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from chanfmt.data.shares import divide
from chanfmt.data.sources import draw_text, together

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
    drawn = [draw_text(name, count, refit.text.seq_len, 0, model=source) for name, count in shares.items()]
    sources, tokens = together(drawn)
    return dataclasses.replace(
        refit, tokens=tokens.ids, source_of=tokens.source_of, sources=tuple(item.name for item in sources), text=None
    )
