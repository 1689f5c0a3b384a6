"""Peak memory of a stretch of work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from chanfmt.models.device_memory import device_peak, restart_device_peaks

_PROCESS = Path("/proc/self")


class PeakMemory:
    """The largest memory use since the object was made: torch's allocations on a GPU, and the process's resident set.

    Attributes:
        kind: What `bytes` counts: ``rss``, or the type of the device that holds the model, such as ``cuda``.
    """

    def __init__(self, model: Any) -> None:
        """Begin for ``model``, which is loaded."""
        self._model = model
        restart_device_peaks(model)
        self.kind = "rss" if device_peak(model) is None else next(model.parameters()).device.type
        self._known = self._start()

    def bytes(self) -> int | None:
        """The peak of a GPU that holds a part of the model, or else `host_bytes`."""
        return self.host_bytes() if self.kind == "rss" else device_peak(self._model)

    def host_bytes(self) -> int | None:
        """The peak of the resident set in bytes; None if the system records no peak that can be reset. Linux does."""
        if not self._known:
            return None
        peak = re.search(r"VmHWM:\s*(\d+) kB", (_PROCESS / "status").read_text())
        return int(peak[1]) * 1024 if peak else None

    def _start(self) -> bool:
        try:
            # Writing 5 resets the peak to what is resident now. Otherwise a small model would show the peak of a large one before it.
            (_PROCESS / "clear_refs").write_text("5")
        except OSError:
            return False
        return True
