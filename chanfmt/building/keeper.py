"""Write the partial atlas of a build when it is due. A failure to write it does not end the build."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

from chanfmt.base.errors import ChanfmtError, first_line
from chanfmt.base.narrate import warn
from chanfmt.base.publishing import OutputAppearedError
from chanfmt.base.schedule import Schedule
from chanfmt.building.gradients import remove_gradients
from chanfmt.format.writer import write_atlas

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from chanfmt.building.measure import Measurement
    from chanfmt.format.records import AtlasContent


class Keeper:
    """Writes the partial atlases of one build, each in place of the one before.

    Args:
        path: File of the partial atlas.
        every: As for `chanfmt.base.schedule.Schedule`.
        make: Makes the content of the partial atlas from a measurement that is under way.
    """

    def __init__(self, path: Path, every: float | None, make: Callable[[Measurement], AtlasContent]) -> None:
        self.path = path
        self._schedule = Schedule(every, time.monotonic())
        self._make = make
        self._warned = False

    def due(self, measurement: Measurement) -> bool:
        """Whether it is time for a partial atlas."""
        return self._schedule.due(time.monotonic(), measurement.nbytes)

    def save(self, measurement: Measurement) -> bool:
        """Write a partial atlas now. Returns whether it was written.

        If it cannot be written, the partial atlas before it stays, and the first time a warning says so.
        """
        start = time.monotonic()
        try:
            measurement.keep_beside(self.path)
            write_atlas(self._make(measurement), self.path, must_read_back=False)
            measurement.kept(self.path)
            return True
        except (ChanfmtError, OSError, MemoryError) as error:
            self._failed(error)
            return False
        finally:
            self._schedule.tried(start, time.monotonic(), measurement.nbytes)

    def remove(self) -> None:
        """Remove the partial atlas and what belongs to it, once the atlas is written."""
        remove_partial(self.path)

    @contextlib.contextmanager
    def saving_on_failure(self, measurement: Measurement) -> Iterator[None]:
        """Save ``measurement`` if the body fails, and raise the body's error even if saving fails.

        A `ChanfmtError` of the body gains the hint how to continue. The body takes seconds; the pass before it may have
        taken days.
        """
        try:
            yield
        except OutputAppearedError:
            # The atlas is finished, and kept under another name.
            self.remove()
            raise
        except (Exception, KeyboardInterrupt) as error:
            saved = False
            try:
                saved = self.save(measurement)
            # Any second error is only a warning: the user has to mend the first one.
            except (Exception, KeyboardInterrupt) as second:
                self._failed(second)
            if isinstance(error, ChanfmtError) and os.path.lexists(self.path):
                held = "what was measured" if saved else "an earlier part of what was measured"
                way_out = f"{self.path} holds {held}: mend that, then continue with the same command and --resume"
                error.add_hint(way_out)
            raise

    def _failed(self, error: BaseException) -> None:
        """Warn of ``error`` the first time, and remove what was written for a partial atlas that does not exist."""
        if not self._warned:
            text = error.message if isinstance(error, ChanfmtError) else first_line(error)
            warn(f"no partial atlas was written: {'out of memory' if isinstance(error, MemoryError) else text}")
        self._warned = True
        if not os.path.lexists(self.path):
            with contextlib.suppress(OSError):
                remove_gradients(self.path)


def remove_partial(path: Path) -> None:
    """Remove the partial atlas ``path``, if there is one, and the gradient files that belong to it. Raises `OSError`."""
    path.unlink(missing_ok=True)
    remove_gradients(path)
