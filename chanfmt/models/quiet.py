"""Keep transformers' own output off the terminal."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOCK = threading.RLock()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and log lines off stderr in the body. Errors are raised as usual.

    One thread at a time runs a body. The settings belong to the process, and so do the functions of torch and transformers
    that transformers replaces while it loads a model: two loads at once would leave tied weights random, for good.
    """
    from transformers.utils import logging

    with _LOCK:
        verbosity = logging.get_verbosity()
        bars = logging.is_progress_bar_enabled()
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
