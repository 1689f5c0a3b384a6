"""Time and memory of ``atlas report`` on atlases of the size of real ones: ``python bench/report.py [8B|70B|MoE ...]``."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from synthetic import synthetic_content

from chanfmt.format.writer import write_atlas

SIZES = {"8B": (32, 0, 14336), "70B": (80, 0, 28672), "MoE": (48, 128, 768)}
SECONDS, MEGABYTES = 30, 1000
"""Budget of an 8B model: seconds, and MB of peak resident memory."""


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        for name in sys.argv[1:] or SIZES:
            path = Path(directory) / f"{name}.h5"
            write_atlas(synthetic_content(*SIZES[name]), path)
            began = time.perf_counter()
            child = os.fork()
            if not child:
                # A new program, so that the memory used to make the atlas does not count.
                os.execv(sys.executable, [sys.executable, "-m", "chanfmt", "report", str(path), "-o", f"{directory}/{name}"])
            _, status, usage = os.wait4(child, 0)
            if status:
                raise SystemExit(f"atlas report ended with {os.waitstatus_to_exitcode(status)}")
            seconds, memory = time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e6
            ratio = f"   {seconds / SECONDS:.2f} and {memory / MEGABYTES:.2f} of the budget" if name == "8B" else ""
            print(f"{name}: {path.stat().st_size / 1e6:.0f} MB   {seconds:.1f} s   {memory:.0f} MB{ratio}", flush=True)


if __name__ == "__main__":
    main()
