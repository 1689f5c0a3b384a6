"""The command `atlas-tui`, and `python -m tui`."""

from __future__ import annotations

import sys

from chanfmt.base.start import start


def main() -> int:
    """Run `atlas-tui` with the arguments of the process. Returns the exit code."""
    return start("tui.cli")


if __name__ == "__main__":
    sys.exit(main())
