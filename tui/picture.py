"""Draw a screen of the program as an SVG, without a terminal."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from chanfmt.base.errors import ChanfmtError, UsageError
from chanfmt.base.files import atomic_file, check_target

if TYPE_CHECKING:
    from pathlib import Path

    from textual.pilot import Pilot

    from tui.app import AtlasApp

SIZE = (120, 36)
"""Default columns and rows."""
_SIZE = re.compile(r"(\d{2,3})x(\d{1,3})")


def parse_size(text: str) -> tuple[int, int]:
    """Columns and rows of ``COLUMNSxROWS``. Raises `UsageError` for other text and for less than 20x5."""
    match = _SIZE.fullmatch(text)
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if size[0] < 20 or size[1] < 5:
        raise UsageError(f"--size: {text!r} is not COLUMNSxROWS", hint="give at least 20x5, for example --size 80x24")
    return size


def draw(app: AtlasApp, path: Path, size: tuple[int, int], *, overwrite: bool) -> None:
    """Draw the first screen of ``app`` into ``path``, whole or not at all.

    Raises:
        UsageError: ``path`` exists and ``overwrite`` is False, or ``path`` cannot be written.
        ChanfmtError: The disk is full.
    """
    check_target(path, overwrite=overwrite)
    svg: list[str] = []

    async def look(pilot: Pilot[object]) -> None:
        await app.workers.wait_for_complete()
        # The result of a worker may open another screen, which paints only when it knows its size.
        for _ in range(3):
            await pilot.pause()
        svg.append(app.export_screenshot(title=app.session.file_name))
        app.exit()

    app.run(headless=True, size=size, auto_pilot=look)
    if not svg:
        raise ChanfmtError(f"the screen could not be drawn at {size[0]}x{size[1]}", hint="please report this")
    with atomic_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(svg[0], encoding="utf-8")
