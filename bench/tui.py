"""Costs of atlas-tui in a terminal: CPU time and bytes per key, next to their budgets.

    python bench/tui.py [ATLAS ...]

Without files, the script makes atlases of the sizes of an 8B model, a 70B model and an MoE in a temporary directory.
The program runs on a pseudo-terminal. CPU time is that of all threads until the program is quiet; bytes are the program's
output. The script presses two keys that undo each other, several times in turn, and prints the median.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import statistics
import struct
import sys
import tempfile
import termios
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from synthetic import synthetic_content

from chanfmt.format.writer import write_atlas

if TYPE_CHECKING:
    from collections.abc import Iterator

QUIET = 0.35
"""Seconds without output after which the effect of a key is complete."""
SMALL, LARGE = (80, 24), (160, 50)
SIZES = {"8B": (32, 0, 14336), "70B": (80, 0, 28672), "MoE": (48, 128, 768)}
# The atlas of the MoE has twice the channels of the 70B model, and the same budgets.
ON_SCREEN = {"8B": 1.0, "70B": 1.5, "MoE": 1.5}
"""Seconds until the overview is on screen."""
MEMORY = {"8B": 100, "70B": 160, "MoE": 160}
"""MB at the end of a run."""
PAGES = ("\x1b[6~", "\x1b[5~")


class Program:
    """``atlas-tui FILE`` on a pseudo-terminal."""

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        self.began = time.monotonic()
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TMUX")}
            environment |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
            os.execve(sys.executable, [sys.executable, "-m", "tui", str(path)], environment)
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))

    def read_until(self, text: bytes) -> float:
        """Read output until ``text`` is in it. Returns seconds since the start."""
        output = b""
        while text not in output:
            if time.monotonic() > self.began + 60:
                raise SystemExit(f"the program did not print {text!r}: {output[-500:]!r}")
            try:
                output += self._read(1.0)
            except OSError:
                raise SystemExit(f"atlas-tui ended: {output.decode(errors='replace').strip()}") from None
        return time.monotonic() - self.began

    def settle(self, quiet: float = QUIET) -> int:
        """Read output until there is none for ``quiet`` seconds. Returns its bytes."""
        total = 0
        while data := self._read(quiet):
            total += len(data)
        return total

    def _read(self, seconds: float) -> bytes:
        if not select.select([self.descriptor], [], [], seconds)[0]:
            return b""
        return os.read(self.descriptor, 1 << 20)

    def press(self, keys: str) -> tuple[float, int]:
        """Press ``keys``. Returns CPU milliseconds and bytes of output."""
        before = self.cpu()
        os.write(self.descriptor, keys.encode())
        size = self.settle()
        return self.cpu() - before, size

    def cpu(self) -> float:
        """CPU milliseconds used so far, by all threads."""
        # Linux's CPU clock of another process includes threads that have ended.
        return time.clock_gettime_ns((~self.pid << 3) | 2) / 1e6

    def memory(self) -> float:
        """Resident memory in MB, libraries included."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e6


@contextmanager
def running(path: Path, size: tuple[int, int]) -> Iterator[tuple[Program, float]]:
    """Start the program and wait for its overview. Yields the program and the seconds until the overview was on screen."""
    program = Program(path, size)
    try:
        seconds = program.read_until(b"help")
        program.settle(1.0)
        yield program, seconds
    finally:
        os.kill(program.pid, signal.SIGTERM)
        os.waitpid(program.pid, 0)
        os.close(program.descriptor)


def row(name: str, value: float, budget: float, unit: str) -> None:
    """Print a measured value next to its budget."""
    print(f"  {name:<44} {value:>9.2f} {unit:<3} {budget:>7g}   {value / budget:5.2f}", flush=True)


def keys(program: Program, name: str, pair: tuple[str, str], cpu: float | None, size: float | None) -> None:
    """Press the two keys of ``pair`` in turn, and print the median costs next to their budgets in ms and kB."""
    for key in pair:
        program.press(key)
    costs = [program.press(key) for key in pair * 4]
    if cpu is not None:
        row(f"{name}, CPU", statistics.median(cost for cost, _ in costs), cpu, "ms")
    if size is not None:
        row(f"{name}, bytes", statistics.median(written for _, written in costs) / 1000, size, "kB")


def measure(name: str, path: Path) -> None:
    """Print the costs of the screens for the atlas at ``path``."""
    print(f"\n{name}: {path.stat().st_size / 1e6:.0f} MB{'':<37} measured      budget   ratio")
    with running(path, SMALL) as (program, seconds):
        row("overview on screen", seconds, ON_SCREEN.get(name, 1.0), "s")
        keys(program, "overview, cursor", ("j", "k"), 5, 2)
        keys(program, "overview, page", PAGES, 15, 8)
        program.press("\r")
        if name == "MoE":
            keys(program, "experts, cursor", ("j", "k"), 5, 2)
            keys(program, "experts, page", PAGES, 15, 8)
            program.press("\r")
        keys(program, "channels, cursor", ("j", "k"), 5, 2)
        keys(program, "channels, page", PAGES, 15, 8)
        # The budget is 5 ms for the order and 15 ms for a page, because every row changes.
        keys(program, "channels, sort", ("S", "s"), 5 + 15, None)
        print(f"  {'idle for 5 s, bytes':<44} {program.settle(5.0):>9} {'':<3} {0:>7}", flush=True)
        row("memory", program.memory(), MEMORY.get(name, 100), "MB")
        program.press("w")
        program.settle(3.0)
        # The same budget as for a sort.
        keys(program, "what-if, one percent", ("l", "h"), 5 + 15, 8)
    with running(path, LARGE) as (program, _):
        keys(program, "strips at 160x50", ("i", "i"), None, 60)


def main() -> None:
    if len(sys.argv) > 1:
        for text in sys.argv[1:]:
            measure(Path(text).name, Path(text))
        return
    with tempfile.TemporaryDirectory() as directory:
        for name, size in SIZES.items():
            path = Path(directory) / f"{name}.h5"
            write_atlas(synthetic_content(*size), path)
            measure(name, path)


if __name__ == "__main__":
    main()
