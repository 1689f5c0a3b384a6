"""The command `surgery`, and `python -m surgery`."""

from __future__ import annotations

import sys

from chanfmt.base.start import start


def main() -> int:
    """Run `surgery` with the arguments of the process. Returns the exit code."""
    return start("surgery.cli.main")


if __name__ == "__main__":
    sys.exit(main())
