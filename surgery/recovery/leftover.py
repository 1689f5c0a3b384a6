"""The directory of an unfinished refit beside its output: its name, and when it may be removed. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from typing import TYPE_CHECKING

from chanfmt.base.files import real_path
from surgery.result.names import REPORT_FILE

if TYPE_CHECKING:
    from pathlib import Path

SUFFIX = ".partial"
STATE_FILE = "state.json"
"""Lists the other files of the directory."""
OURS = re.compile(rf"[0-9a-f]{{12}}\.[0-9]+\.(weights|hidden)|{re.escape(STATE_FILE)}|\..*\.tmp")
"""Names of files in the directory."""


def partial_path(output: Path) -> Path:
    """Directory of the unfinished refit for ``output``."""
    target = real_path(output)
    return target.with_name(target.name + SUFFIX)


def is_ours(path: Path) -> bool:
    """Whether nothing lies at ``path``, or only what a refit keeps."""
    if not os.path.lexists(path):
        return True
    return path.is_dir() and not path.is_symlink() and all(map(OURS.fullmatch, os.listdir(path)))


def remove_partial(path: Path) -> None:
    """Remove the directory ``path`` of an unfinished refit, if there is one."""
    # What cannot be removed is harmless: the next refit checks it.
    with contextlib.suppress(OSError):
        if os.path.lexists(path) and is_ours(path):
            # Without its list, nobody takes the rest for a refit.
            (path / STATE_FILE).unlink(missing_ok=True)
            shutil.rmtree(path)


def remove_finished(output: Path) -> None:
    """Remove what a command left that was killed after it published ``output`` and before it removed its refit."""
    path = partial_path(output)
    if not os.path.lexists(path):
        return
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        left, report = (json.loads(file.read_bytes()) for file in (path / STATE_FILE, output / REPORT_FILE))
        # Errors of all layers to the last digit are alike in the same refit only.
        if left["layers"] == report["recovery"]["layers"]:
            remove_partial(path)
