"""The `surgery` command."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from chanfmt.cli import framework
from surgery.cli import ablate, apply, eval, plan, prune, push, replaceability, restore, shrink, sweep

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = (shrink, prune, plan, apply, push, restore, eval, sweep, ablate, replaceability)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `surgery`. Returns the exit code."""
    parser, commands = framework.make_parser("surgery", "Remove the FFN channels that an importance atlas says matter least.")
    for command in COMMANDS:
        command.add(commands)
    return framework.run_command(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
