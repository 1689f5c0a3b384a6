"""Figures of `chanfmt.plot`, drawn in a process of its own, so that the browser does not need matplotlib."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from chanfmt.base.child import interpreter
from chanfmt.base.errors import ChanfmtError
from tui.session.measuring import Process

if TYPE_CHECKING:
    from collections.abc import Callable

    from tui.session.front import Host

CELL = (10, 20)
"""Pixels of a cell of the terminal, width and height: the picture is scaled to what the terminal has."""
DPI = 100
KEPT = 16
"""Pictures that are kept."""
_CODE = """
import sys
from chanfmt import plot
from chanfmt.base.errors import ChanfmtError
atlas, x, y, layer, width, height, dpi, path = sys.argv[1:]
try:
    figure = plot.scatter(atlas, x, y, int(layer)).figure
except ChanfmtError as error:
    sys.exit(error.message)
figure.set_size_inches(int(width) / int(dpi), int(height) / int(dpi))
figure.savefig(path, dpi=int(dpi), format="png")
"""


class Pictures:
    """The pictures of a session: at most one is drawn at a time."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._kept: dict[tuple[object, ...], bytes] = {}
        self._process: Process | None = None

    def scatter(self, layer: int, x: str, y: str, size: tuple[int, int], then: Callable[[bytes], object]) -> None:
        """Draw ``y`` against ``x`` over the channels of ``layer`` in ``size`` cells, and call ``then`` with the PNG."""
        snapshot = self._host.snapshots[0]
        key = (snapshot.signature, layer, x, y, size)
        if key in self._kept:
            then(self._kept[key])
            return
        self.stop()
        process = self._process = Process()

        def have(png: bytes) -> None:
            if not process.stopped:
                self._kept[key] = png
                for old in list(self._kept)[:-KEPT]:
                    del self._kept[old]
                then(png)

        def refused(reason: str) -> None:
            if not process.stopped:
                self._host.say(reason)

        self._host.front.start(
            lambda: draw_scatter(process, snapshot.path, layer, x, y, size),
            have,
            refused=refused,
            group="picture",
            exclusive=False,
        )

    def stop(self) -> None:
        """Stop drawing, if something is being drawn."""
        if self._process is not None:
            self._process.stop()


def draw_scatter(process: Process, atlas: Path, layer: int, x: str, y: str, size: tuple[int, int]) -> bytes:
    """`chanfmt.plot.scatter` of an atlas as a PNG of ``size`` cells; nothing if ``process`` is stopped. Raises `ChanfmtError`."""
    with tempfile.TemporaryDirectory(prefix="atlas-tui-") as directory:
        path = Path(directory) / "scatter.png"
        pixels = (str(cells * cell) for cells, cell in zip(size, CELL, strict=True))
        words = [str(atlas.absolute()), x, y, str(layer), *pixels, str(DPI), str(path)]
        code = process.run([*interpreter(), "-c", _CODE, *words])
        if process.stopped:
            return b""
        if code or not path.exists():
            last = next((line for line in reversed(process.lines) if line.strip()), f"exit code {code}")
            raise ChanfmtError(f"the picture could not be drawn: {last}")
        return path.read_bytes()
