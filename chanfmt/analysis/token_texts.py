"""The text of token ids, without transformers and torch."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

from chanfmt.base.errors import ModelError, first_line
from chanfmt.base.text import one_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from chanfmt.analysis.driving import DrivingToken

_LONGEST = 200
"""Characters of a part of a context at most."""
_PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {ord("\n"): "↵", ord("\t"): "→", 0x7F: "␡"}
"""Control characters to characters that show them."""


class Context(NamedTuple):
    """A driving token and the text around it. Each part is one line without control characters."""

    before: str
    token: str
    after: str


class TokenTexts:
    """The texts of the tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def read(cls, path: Path) -> TokenTexts:
        """Those of the file ``path``, a ``tokenizer.json``. Raises `ModelError` if it cannot be read."""
        from tokenizers import Tokenizer

        try:
            return cls(Tokenizer.from_file(str(path)))
        # The library raises Exception itself.
        except Exception as error:
            raise ModelError(f"cannot read the tokenizer {path}: {first_line(error)}") from None

    def context(self, token: DrivingToken) -> Context | None:
        """``token`` in its context; None if its id is not known."""
        if token.token is None:
            return None
        before, middle, whole = (
            self._decoded(ids) for ids in (token.before, (*token.before, token.token), (*token.before, token.token, *token.after))
        )
        # A character may consist of several tokens, and a part of it has no text of its own.
        first = _alike(before, middle)
        second = max(first, _alike(middle, whole))
        return Context(
            visible(whole[:first][-_LONGEST:]),
            visible(middle[first:] or "\N{REPLACEMENT CHARACTER}"),
            visible(whole[second:][:_LONGEST]),
        )

    def _decoded(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


def _alike(first: str, second: str) -> int:
    """Characters with which both texts begin."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def visible(text: str) -> str:
    """``text`` in one line: control characters as their pictures, and what a terminal obeys besides as U+FFFD."""
    return one_line(text.translate(_PICTURES), _LONGEST)
