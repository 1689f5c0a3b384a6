"""The special tokens around a text and around a sequence: BOS, or CLS and SEP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.choices import unknown
from chanfmt.base.errors import ModelError, UsageError
from chanfmt.data.text import BOS
from chanfmt.data.tokens import encode
from chanfmt.format.records import NO_SPECIAL_TOKENS, SpecialTokens

if TYPE_CHECKING:
    import numpy as np

_PROBES = ("a", "A", "1", "的")
"""Texts to try a tokenizer on. The first that shows the special tokens counts."""


def added_by(tokenizer: Any, name: str) -> SpecialTokens:
    """The tokens that ``tokenizer`` puts around a text.

    The tokenizer is tried out, because attributes such as ``add_bos_token`` tell the truth for some classes only.

    Args:
        name: Name of the model in errors.

    Raises:
        ModelError: The tokenizer fails, or adds tokens, but not around the text.
    """
    failed: ModelError | None = None
    for text in _PROBES:
        try:
            whole, bare = (list(encode(tokenizer, text, repr(text), special=special)["input_ids"]) for special in (True, False))
        except ModelError as error:
            failed = error
            continue
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                return SpecialTokens(tuple(whole[:start]), tuple(whole[start + len(bare) :]))
    raise failed or ModelError(
        f"what the tokenizer of {name} puts around a text cannot be told: with its special tokens it makes other tokens of the "
        "text itself",
        hint="save the tokenizer that the model was trained with into its directory",
    )


def around_sequences(tokenizer: Any, added: SpecialTokens, bos: str, name: str) -> SpecialTokens:
    """The tokens that every calibration sequence begins and ends with.

    Args:
        added: The tokens that ``tokenizer`` puts around a text.
        bos: ``auto`` for ``added``; ``always`` for ``added``, or for the tokenizer's BOS if it puts nothing before a text;
            ``never`` for none.
        name: Name of the model in errors.

    Raises:
        UsageError: ``always``, and the tokenizer has no BOS.
    """
    if bos not in BOS:
        raise unknown("bos", bos, BOS)
    if bos == "never":
        return NO_SPECIAL_TOKENS
    if bos == "auto" or added.before:
        return added
    if tokenizer.bos_token_id is None:
        raise UsageError(
            f"--bos always: the tokenizer of {name} has no BOS, and it puts nothing before a text", hint="use --bos auto"
        )
    return SpecialTokens((int(tokenizer.bos_token_id),), added.after)


def found_around(ids: np.ndarray, added: SpecialTokens) -> SpecialTokens:
    """The part of ``added`` that all given sequences ``ids`` (sequence, position) begin and end with."""
    length = ids.shape[1]
    if len(added) >= length:
        return NO_SPECIAL_TOKENS
    begins = (ids[:, : len(added.before)] == added.before).all()
    ends = (ids[:, length - len(added.after) :] == added.after).all()
    return SpecialTokens(added.before if begins else (), added.after if ends else ())
