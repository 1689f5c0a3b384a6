"""The command ``atlas-tui FILE``: check the file, then show the file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from chanfmt.base.errors import UsageError
from chanfmt.base.text import printable
from chanfmt.base.version import __version__
from chanfmt.cli.framework import Parser, run_command
from tui.session.place import ASCENDING, Place
from tui.session.registry import OF_TWO, SCREENS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    import numpy as np

    from tui.session.load import Snapshot


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(make_parser(), arguments)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="atlas-tui", description="Browse an importance atlas in the terminal.")
    parser.add_argument("file", metavar="FILE", help="the atlas: a file, or hf://REPO/FILE")
    parser.add_argument(
        "other", nargs="?", metavar="FILE", help="a second atlas of the same architecture, to compare with the first"
    )
    parser.add_argument(
        "--protect",
        metavar="FILE",
        help="protect file (.json) to read marks from and write marks to (default: FILE.protect.json beside the atlas)",
    )
    where = parser.add_argument_group("first screen")
    where.add_argument("--screen", choices=SCREENS, help="screen (default: overview; with two atlases, compare)")
    where.add_argument("--layer", type=int, metavar="L", help="layer index in the model")
    where.add_argument("--stack", metavar="NAME", help="stack of the FFN, if the layer has several FFNs")
    where.add_argument("--expert", type=int, metavar="E", help="index of the expert in the layer")
    where.add_argument("--channel", type=int, metavar="C", help="id of the channel under the cursor")
    where.add_argument("--metric", default="lp", metavar="METRIC", help="metric to show (default: lp)")
    where.add_argument("--by-index", action="store_true", help="order the x axes by channel index instead of log rank")
    where.add_argument(
        "--sort",
        default="",
        metavar="COLUMN",
        help=f"column that orders the channels, for example a metric, channel, label; COLUMN{ASCENDING} sorts the smallest first",
    )
    where.add_argument(
        "--filter",
        default="",
        metavar="CONDITION",
        help="show only these channels; the syntax is that of the key f, for example 'lp>1e-3 & super'",
    )
    where.add_argument("--theme", metavar="NAME", help="colours: a theme of Textual, for example textual-light")
    picture = parser.add_argument_group("pictures, drawn without a terminal")
    picture.add_argument(
        "--screenshot", choices=SCREENS, metavar="SCREEN", help="draw this screen into the file ATLAS-SCREEN.svg, and quit"
    )
    picture.add_argument(
        "--export-svg",
        metavar="FILE",
        help="draw into FILE (an SVG) the screen that --screenshot names, or else the first screen, and quit",
    )
    picture.add_argument("--size", metavar="COLSxROWS", help="size of the picture (default: 120x36)")
    picture.add_argument("--overwrite", action="store_true", help="replace the picture if it exists")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(run=_run)
    return parser


def _run(options: argparse.Namespace) -> int:
    # These imports are late so that --help and a wrong option answer at once.
    from chanfmt.hub.locate import locate_atlas
    from tui.session.comparison import check_comparable
    from tui.session.load import read_snapshot
    from tui.session.protect import check_name, read_marks

    snapshot = read_snapshot(locate_atlas(options.file).path, contained=True)
    other = None
    if options.other is not None:
        other = read_snapshot(locate_atlas(options.other).path, contained=True)
        check_comparable(snapshot.path, other.path)
    protect_file = _protect_file(options, snapshot.path)
    check_name(protect_file)
    place = _place(options, compared=other is not None)
    place.find(snapshot)
    drawn = _picture(options, snapshot.path, place)
    if drawn is not None:
        named = [Path(name) for name in (options.file, options.other) if name is not None]
        _check_picture(drawn, [*named, *(read.path for read in (snapshot, other) if read is not None), protect_file])
    marks, warnings, signature = read_marks(protect_file, snapshot)
    _check_filter(place, snapshot, other, marks)
    if drawn is None and not (all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))):
        raise UsageError(
            "atlas-tui needs a terminal",
            hint=f"to a pipe or a file, use: atlas info {options.file}, or: atlas show {options.file} --layer 0; "
            "for a picture, add --screenshot SCREEN",
        )
    from tui.app import AtlasApp
    from tui.session.session import Session

    session = Session(
        snapshot,
        atlas_name=options.file,
        protect_file=protect_file,
        marks=marks,
        protect_signature=signature,
        other=other,
        place=place,
    )
    app = AtlasApp(session)
    if options.theme is not None:
        if options.theme not in app.available_themes:
            raise UsageError(f"unknown theme {options.theme!r}", hint=f"choose from {', '.join(sorted(app.available_themes))}")
        app.theme = options.theme
    if drawn is not None:
        from tui.picture import SIZE, draw, parse_size

        draw(app, drawn, parse_size(options.size) if options.size else SIZE, overwrite=options.overwrite)
        print(drawn)
        return 0
    if warnings:
        app.call_later(session.say, printable(warnings[0]))
    last_words = app.run()
    if last_words:
        print(last_words)
    return app.return_code or 0


def _place(options: argparse.Namespace, *, compared: bool) -> Place:
    screen = options.screenshot or options.screen or (OF_TWO[0] if compared else SCREENS[0])
    if screen in OF_TWO and not compared:
        raise UsageError(f"the screen {screen} needs a second atlas", hint="give two files: atlas-tui FILE FILE")
    return Place(
        screen,
        options.layer,
        options.stack,
        options.expert,
        options.channel,
        options.metric,
        options.by_index,
        options.sort,
        options.filter,
    )


def _picture(options: argparse.Namespace, atlas: Path, place: Place) -> Path | None:
    """The file to draw into; None if the user asked for no picture."""
    if options.export_svg is not None:
        return Path(options.export_svg)
    return Path(f"{atlas.name.partition('.')[0]}-{place.screen}.svg") if options.screenshot else None


def _check_picture(picture: Path, files: Sequence[Path]) -> None:
    for path in files:
        if os.path.realpath(picture) == os.path.realpath(path):
            raise UsageError(f"the picture would replace {path}", hint="give another file to --export-svg")


def _check_filter(place: Place, snapshot: Snapshot, other: Snapshot | None, marks: dict[int, np.ndarray]) -> None:
    """Raise `UsageError` if the filter is not valid, or if no channel fits the filter."""
    import numpy as np

    from tui.session.comparison import counterparts, joined
    from tui.session.filter import filtered
    from tui.session.model import Browser

    if not place.filter:
        return
    browser, ffn = Browser(snapshot, place.metric), place.find(snapshot)
    if other is not None and place.screen == "join":
        both = joined(browser, Browser(other, place.metric), counterparts(snapshot, other), snapshot.block_of(ffn))
        columns, labels, words = both.columns, both.labels[0], both.words
    else:
        columns, labels = browser.columns(ffn), snapshot.labels_of(ffn)
        words = {"marked": marks.get(ffn, np.zeros(len(labels), dtype=bool))}
    if not filtered(place.filter, columns, labels, words).any():
        raise UsageError(f"no channel of {snapshot.ffns[ffn].name(with_stack=snapshot.several_stacks)} fits {place.filter!r}")


def _protect_file(options: argparse.Namespace, atlas: Path) -> Path:
    from tui.session.protect import default_protect_file

    if options.protect is not None:
        return Path(options.protect)
    # The atlas is in the Hub cache, which is not a place for the user's files.
    return Path(default_protect_file(atlas).name) if options.file.startswith("hf://") else default_protect_file(atlas)
