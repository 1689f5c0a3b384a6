"""The texts of tokens, by the model's tokenizer if it is on this machine. It is read in a thread, when a screen first needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chanfmt.analysis.token_texts import TokenTexts
from chanfmt.hub.locate import locate_tokenizer

if TYPE_CHECKING:
    from chanfmt.analysis.driving import DrivingToken
    from chanfmt.analysis.token_texts import Context
    from tui.session.front import Host

READING = "reading the tokenizer"
MISSING = "ids: no tokenizer here, see --model"


class Texts:
    """The tokenizer of a session's model.

    Args:
        model: Where its tokenizer is, as after ``--model``; None for the model that the atlas names.

    Attributes:
        state: Why there are no texts; empty if there are.
    """

    def __init__(self, host: Host, model: str | None = None) -> None:
        self._host = host
        self._model = model
        self._texts: TokenTexts | None = None
        self._asked = False
        self.state = READING

    def context(self, token: DrivingToken) -> Context | None:
        """``token`` in its context; None if that is not known, or not yet. Then every screen is painted again when it is."""
        if not self._asked:
            self._asked = True
            record = self._host.snapshots[0].model
            self._host.front.start(
                lambda: None if (path := locate_tokenizer(record, self._model)) is None else TokenTexts.read(path),
                self._have,
                refused=self._refused,
                group="tokenizer",
            )
        return None if self._texts is None else self._texts.context(token)

    def _have(self, texts: TokenTexts | None) -> None:
        self._texts, self.state = texts, MISSING if texts is None else ""
        self._host.front.show_browser()

    def _refused(self, reason: str) -> None:
        self.state = reason
        self._host.front.show_browser()
