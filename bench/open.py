"""Time to open a large atlas that is in the page cache. Prints medians in milliseconds next to their budgets.

    python bench/open.py [REPETITIONS]

The script writes two atlases of random numbers to a temporary directory: a dense gated model of 32 x 14336 channels, and
48 layers of 128 experts with 768 channels each. To open an atlas includes the check of its whole structure.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from synthetic import synthetic_content

import chanfmt
from chanfmt.format.writer import write_atlas

if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    with tempfile.TemporaryDirectory() as directory:
        print(f"{'atlas':<15} {'what':<42} {'median':>9} {'min':>9} {'budget':>9}")
        for name, layers, experts, channels, budget in (("32 x 14336", 32, 0, 14336, 20), ("48 x 128 x 768", 48, 128, 768, 100)):
            path = Path(directory) / "atlas.h5"
            write_atlas(synthetic_content(layers, experts, channels), path)
            for what, limit, run in (
                ("open, check the structure", None, lambda path=path: open_only(path)),
                ("open, check, read one layer's metric", budget, lambda path=path: one_row(path)),
                ("open, check, read one metric", budget, lambda path=path: whole_metric(path)),
                ("xarray.open_datatree, h5netcdf", 1000, lambda path=path: datatree(path)),
            ):
                median, best = milliseconds(run, repetitions)
                print(f"{name:<15} {what:<42} {median:>6.1f} ms {best:>6.1f} ms {f'{limit} ms' if limit else '':>9}", flush=True)


def open_only(path: Path) -> None:
    chanfmt.open(path).close()


def one_row(path: Path) -> None:
    with chanfmt.open(path) as atlas:
        atlas.stacks["decoder"].row("lp", 5)


def whole_metric(path: Path) -> None:
    with chanfmt.open(path) as atlas:
        atlas.stacks["decoder"]["lp"]


def datatree(path: Path) -> None:
    import xarray

    xarray.open_datatree(path, engine="h5netcdf").close()


def milliseconds(run: Callable[[], None], repetitions: int) -> tuple[float, float]:
    """Median and minimum of ``repetitions`` runs after one that warms up."""
    run()
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times), min(times)


if __name__ == "__main__":
    main()
