"""Peak memory of a stretch of work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PROCESS = Path("/proc/self")


class PeakMemory:
    """The largest memory use since the object was made: torch's allocations on a GPU, or else the process's resident set.

    Attributes:
        kind: ``cuda`` or ``rss``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind = "cuda" if device.type == "cuda" else "rss"
        self._known = self._start()

    def bytes(self) -> int | None:
        """The peak in bytes; None if the system records no peak that can be reset. Linux does."""
        if not self._known:
            return None
        if self.kind == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self.device)
        peak = re.search(r"VmHWM:\s*(\d+) kB", (_PROCESS / "status").read_text())
        return int(peak[1]) * 1024 if peak else None

    def _start(self) -> bool:
        if self.kind == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            # Writing 5 resets the peak to what is resident now. Otherwise a small model would show the peak of a large one before it.
            (_PROCESS / "clear_refs").write_text("5")
        except OSError:
            return False
        return True
