"""The `atlas` command."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from chanfmt.cli import (
    build,
    cache,
    columns,
    compare,
    export,
    framework,
    import_imatrix,
    info,
    label,
    merge,
    pull,
    push,
    report,
    show,
    strip,
    trajectory,
    validate,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = (
    build,
    info,
    show,
    validate,
    label,
    merge,
    strip,
    compare,
    report,
    trajectory,
    export,
    columns,
    import_imatrix,
    push,
    pull,
    cache,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `atlas`. Returns the exit code."""
    parser, commands = framework.make_parser("atlas", "Measure which FFN channels of a model matter.")
    for command in COMMANDS:
        command.add(commands)
    return framework.run_command(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
