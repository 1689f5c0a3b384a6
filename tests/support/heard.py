"""The notes and warnings of library code, for tests that check them."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from chanfmt.base.narrate import LOGGER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def heard(listener: Callable[[str], object] | None = None) -> Iterator[list[str]]:
    """Collect notes and warnings in the body; ``listener`` is called with each, and may raise."""
    said: list[str] = []
    handler = _Handler(said, listener)
    level = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield said
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)


class _Handler(logging.Handler):
    def __init__(self, said: list[str], listener: Callable[[str], object] | None) -> None:
        super().__init__()
        self._said, self._listener = said, listener

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())
        if self._listener is not None:
            self._listener(record.getMessage())
