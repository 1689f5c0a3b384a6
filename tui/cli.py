"""``atlas-tui FILE``: check the file, then show it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from chanfmt import __version__
from chanfmt.console import Parser, printable, run_command
from chanfmt.errors import UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(prog="atlas-tui", description="Browse an importance atlas in the terminal.")
    parser.add_argument("file", metavar="FILE", help="the atlas, a file or hf://REPO/FILE")
    parser.add_argument("other", nargs="?", metavar="FILE", help="another of the same architecture, to compare it with")
    parser.add_argument("--protect", metavar="FILE", help=(
        "protect file (.json) that marks are read from and written to (default: FILE.protect.json beside the atlas)"))
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(run=_run)
    return run_command(parser, arguments)


def _run(options: argparse.Namespace) -> int:
    # Late, so that --help and a wrong option answer at once.
    from chanfmt.hub.locate import locate
    from tui.comparison import check_comparable
    from tui.load import read_snapshot
    from tui.protect import check_name, read_marks

    snapshot = read_snapshot(locate(options.file).path, contained=True)
    other = None
    if options.other is not None:
        other = read_snapshot(locate(options.other).path, contained=True)
        check_comparable(snapshot.path, other.path)
    protect_file = _protect_file(options, snapshot.path)
    check_name(protect_file)
    marks, warnings, signature = read_marks(protect_file, snapshot.path)
    if not (all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))):
        raise UsageError(
            "atlas-tui needs a terminal",
            hint=f"for a pipe or a file: atlas info {options.file}, atlas show {options.file} --layer 0",
        )
    from tui.app import AtlasApp

    app = AtlasApp(snapshot, atlas_name=options.file, protect_file=protect_file, marks=marks, protect_signature=signature,
                   other=other)
    if warnings:
        app.call_later(app.say, printable(warnings[0]))
    app.run()
    return app.return_code or 0


def _protect_file(options: argparse.Namespace, atlas: Path) -> Path:
    from tui.protect import default_protect_file

    if options.protect is not None:
        return Path(options.protect)
    # What the Hub's cache holds is not the user's to write beside.
    return Path(default_protect_file(atlas).name) if options.file.startswith("hf://") else default_protect_file(atlas)
