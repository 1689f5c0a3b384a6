"""The command `atlas`, and `python -m chanfmt`, so that launchers that want a module can start a build."""

from __future__ import annotations

import sys

from chanfmt.base.start import start


def main() -> int:
    """Run `atlas` with the arguments of the process. Returns the exit code."""
    return start("chanfmt.cli.main")


if __name__ == "__main__":
    sys.exit(main())
