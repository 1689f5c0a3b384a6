"""How a command starts another command of chanfmt in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def interpreter() -> list[str]:
    """Python, without modules of the working directory, unless chanfmt itself is run from there."""
    return [sys.executable] if Path.cwd() == _ROOT else [sys.executable, "-P"]
