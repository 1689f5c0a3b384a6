"""Notes, warnings and progress bars of long work.

Library code calls `say`, `warn` and `progress_bar`, and takes no ``quiet`` or ``progress`` arguments. Notes and
warnings go to the logger ``chanfmt``, so a program that imports chanfmt decides with `logging` what it shows. Progress
bars are off by default. The command lines show notes, warnings and bars with `to_terminal`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from chanfmt.base.text import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Item = TypeVar("Item")
LOGGER = logging.getLogger("chanfmt")
_bars: ContextVar[bool | None] = ContextVar("bars", default=False)
_DISABLED = {True: False, False: True, None: None}
"""The states of `bars` as tqdm names them; with None, tqdm looks whether stderr is a terminal."""


def say(text: str) -> None:
    """Log ``text``, a sentence about the work in progress. ``--quiet`` hides it."""
    LOGGER.info("%s", one_line(text))


def warn(text: str) -> None:
    """Log ``text``, a sentence about something that may change the result. ``--quiet`` does not hide it."""
    LOGGER.warning("%s", one_line(text))


def progress_bar(total: int, unit: str, description: str) -> Any:
    """A tqdm bar on stderr with rate and time left. It is drawn only if `bars_shown`."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        unit=unit,
        unit_scale=True,
        desc=description,
        leave=False,
        disable=True if sys.stderr is None else _DISABLED[_bars.get()],
        file=sys.stderr,
    )


def counted(items: Sequence[Item], unit: str, description: str) -> Iterator[Item]:
    """The ``items``, with a progress bar that counts the finished items."""
    with progress_bar(len(items), unit, description) as bar:
        for item in items:
            yield item
            bar.update()


def bars_shown() -> bool:
    """Whether progress bars are drawn, see `bars`."""
    # A closed stderr is None.
    return sys.stderr is not None and (sys.stderr.isatty() if _bars.get() is None else bool(_bars.get()))


@contextlib.contextmanager
def bars(shown: bool | None) -> Iterator[None]:
    """Draw progress bars in the body if ``shown``; None draws them if stderr is a terminal."""
    token = _bars.set(shown)
    try:
        yield
    finally:
        _bars.reset(token)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Log only warnings in the body, and draw no bars: for all but the first process of a distributed group."""
    level = LOGGER.level
    LOGGER.setLevel(logging.WARNING)
    try:
        with bars(False):
            yield
    finally:
        LOGGER.setLevel(level)


@contextlib.contextmanager
def to_terminal(*, quiet: bool = False) -> Iterator[None]:
    """Print notes and warnings to stderr in the body, and draw progress bars.

    Args:
        quiet: Print warnings only.
    """
    handler = _StderrHandler()
    level, propagate = LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.WARNING if quiet else logging.INFO)
    LOGGER.propagate = False
    try:
        with bars(False if quiet else None):
            yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate


class _StderrHandler(logging.Handler):
    """Prints each record as a line on the current ``sys.stderr``."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        try:
            with _above_bars():
                print(prefix + record.getMessage(), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def _above_bars() -> contextlib.AbstractContextManager[object]:
    """A context in which a printed line does not mix with a progress bar.

    Without bars, tqdm's lock is not taken: an interrupt while the lock is released would leave it taken for ever.
    """
    tqdm = sys.modules.get("tqdm")
    return tqdm.tqdm.external_write_mode(file=sys.stderr) if tqdm is not None and bars_shown() else contextlib.nullcontext()
