"""The command ``atlas-tui FILE``: check the file, then show the file."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from chanfmt.base.choices import unknown
from chanfmt.base.errors import UsageError
from chanfmt.base.files import output_path
from chanfmt.base.inputs import input_path
from chanfmt.base.text import one_line
from chanfmt.cli.framework import Parser, add_options, print_line, run_command
from chanfmt.cli.framework.options import TOKENIZER_MODEL
from tui.session.keys import VARIABLE
from tui.session.place import ASCENDING, QUERY, Place
from tui.session.registry import OF_TWO, SCREENS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    import numpy as np

    from tui.session.load import Snapshot


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(make_parser(), arguments)


NO_SCREEN = ("", "dumb", "unknown")
"""Values of TERM of terminals that show lines only: Emacs's shell, some editors, some services for continuous integration."""

EXAMPLES = (
    "atlas-tui llama.h5",
    "atlas-tui base.h5 tuned.h5",
    "atlas-tui llama.h5 --screenshot overview --size 100x30",
)


@dataclass(frozen=True)
class FileOptions:
    """Which atlas."""

    file: str = field(metadata={"help": "atlas: a file, or hf://REPO/FILE", "positional": "FILE", "kind": "atlas"})
    other: str | None = field(
        default=None,
        metadata={"help": "another atlas of the same architecture, to compare with", "positional": "FILE", "nargs": "?"},
    )
    protect: str | None = field(
        default=None,
        metadata={
            "help": "protect file (.json) to read marks from and write them to (default: FILE.protect.json next to the atlas)",
            "metavar": "FILE",
        },
    )
    model: str | None = field(default=None, metadata=TOKENIZER_MODEL)


@dataclass(frozen=True)
class PlaceOptions:
    """What is shown first."""

    screen: str | None = field(
        default=None,
        metadata={
            "help": f"{', '.join(SCREENS)} (default: overview; compare for two atlases)",
            "choices": SCREENS,
            "noun": "screen",
            "metavar": "SCREEN",
        },
    )
    layer: int | None = field(default=None, metadata={"help": "layer number in the model", "metavar": "L"})
    stack: str | None = field(
        default=None, metadata={"help": "stack of the FFN, if the layer has FFNs in several stacks", "metavar": "NAME"}
    )
    expert: int | None = field(default=None, metadata={"help": "expert of the layer", "metavar": "E"})
    channel: int | None = field(default=None, metadata={"help": "channel under the cursor", "metavar": "C"})
    metric: str = field(default="lp", metadata={"help": "metric shown", "metavar": "METRIC"})
    by_index: bool = field(default=False, metadata={"help": "draw x axes by index instead of log rank"})
    sort: str = field(
        default="",
        metadata={
            "help": f"order of the channels: a metric, channel or label; COLUMN{ASCENDING} puts the smallest first",
            "metavar": "COLUMN",
        },
    )
    filter: str = field(
        default="", metadata={"help": "condition for the channels shown, as after the key f", "metavar": "CONDITION"}
    )
    keys: str | None = field(
        default=None,
        metadata={
            "help": f"TOML file with other keys for actions (default: {VARIABLE}, or keys.toml in the directory for "
            "configuration)",
            "metavar": "FILE",
        },
    )
    theme: str | None = field(
        default=None, metadata={"help": "colours: any theme of Textual, such as textual-light", "metavar": "NAME"}
    )


@dataclass(frozen=True)
class PictureOptions:
    """Pictures, without a terminal."""

    screenshot: str | None = field(
        default=None,
        metadata={
            "help": "draw this screen as an SVG (ATLAS-SCREEN.svg), and quit",
            "choices": SCREENS,
            "noun": "screen",
            "metavar": "SCREEN",
        },
    )
    export_svg: str | None = field(
        default=None,
        metadata={"help": "draw the first screen, or the screen of --screenshot, into FILE, and quit", "metavar": "FILE"},
    )
    size: str | None = field(default=None, metadata={"help": "size of the picture (default: 120x36)", "metavar": "COLSxROWS"})
    overwrite: bool = field(default=False, metadata={"help": "replace the picture if it exists"})


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="atlas-tui",
        description="Browse an importance atlas in the terminal.",
        fill=_fill,
        examples=EXAMPLES,
        printing=False,
        version=True,
    )
    parser.set_defaults(run=_run)
    return parser


def _fill(parser: Parser) -> None:
    for kind in (FileOptions, PlaceOptions, PictureOptions):
        add_options(parser, kind)


def _run(options: argparse.Namespace) -> int:
    # These imports are late so that --help and a wrong option answer at once.
    from chanfmt.hub.locate import check_model, locate_atlas
    from tui.session.comparison import check_comparable
    from tui.session.load import read_snapshot
    from tui.session.protect import check_name, read_marks

    if options.model is not None:
        check_model(options.model)
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
        named = [input_path(name) for name in (options.file, options.other) if name is not None]
        _check_picture(drawn, [*named, *(read.path for read in (snapshot, other) if read is not None), protect_file])
    marks, warnings, signature = read_marks(protect_file, snapshot)
    _check_filter(place, snapshot, other, marks)
    if drawn is None:
        _check_terminal(options.file)
        _ignore_stale_size()
    from tui.app import AtlasApp
    from tui.images import picture_widget
    from tui.screens.rebinding import keymap
    from tui.session.keys import keys_file, read_keys
    from tui.session.session import Session
    from tui.watchdog import Watchdog

    path = keys_file(options.keys)
    keys = None if path is None else keymap(read_keys(path), path, AtlasApp)
    session = Session(
        snapshot,
        atlas_name=options.file,
        protect_file=protect_file,
        marks=marks,
        protect_signature=signature,
        other=other,
        place=place,
        model=options.model,
    )
    app = AtlasApp(session, keys, picture_widget() if drawn is None else None)
    if options.theme is not None:
        if options.theme not in app.available_themes:
            raise unknown("theme", options.theme, sorted(app.available_themes))
        app.theme = options.theme
    if drawn is not None:
        from tui.picture import SIZE, draw, parse_size

        draw(app, drawn, parse_size(options.size) if options.size else SIZE, overwrite=options.overwrite)
        print_line(str(drawn))
        return 0
    if warnings:
        app.call_later(session.say, one_line(warnings[0]))
    with Watchdog(app.end):
        last_words = app.run()
    if last_words:
        # They are code and command lines, which must be whole.
        for line in last_words.split("\n"):
            print_line(line, len(line))
    return app.return_code or 0


def _check_terminal(file: str) -> None:
    """Raise `UsageError` if there is no terminal that can show the program."""
    if not all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise UsageError(
            "atlas-tui needs a terminal",
            hint=f"to a pipe or a file, use: atlas info {file}, or: atlas show {file} --layer 0; "
            "for a picture, add --screenshot SCREEN",
        )
    kind = os.environ.get("TERM", "")
    if kind in NO_SCREEN:
        raise UsageError(
            f"atlas-tui needs a terminal with a cursor, and TERM is {kind or 'not set'}",
            hint=f"here, use: atlas info {file}, or: atlas show {file} --layer 0; if the terminal has a cursor, set "
            "TERM=xterm-256color",
        )
    # The screens are drawn on stderr. In another encoding, lines of tables would be escapes, and control sequences might be text.
    encoding = sys.stderr.encoding
    if codecs.lookup(encoding).name != "utf-8":
        raise UsageError(
            f"atlas-tui draws in UTF-8, and the encoding of this terminal is {encoding}",
            hint=f"if the terminal shows UTF-8, set PYTHONIOENCODING=utf-8; otherwise use: atlas info {file}",
        )


def _ignore_stale_size() -> None:
    """Let the terminal say its size: COLUMNS and LINES of a parent may be from before the last change of the window."""
    with contextlib.suppress(OSError, ValueError):
        if all(os.get_terminal_size(sys.stdout.fileno())):
            for name in ("COLUMNS", "LINES"):
                os.environ.pop(name, None)


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
        return output_path(options.export_svg)
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
    from tui.session.query import ModelChannels

    if not place.filter:
        return
    browser, ffn = Browser(snapshot, place.metric), place.find(snapshot)
    if place.screen == QUERY:
        masks = [marks.get(each, np.zeros(each_ffn.n_channels, dtype=bool)) for each, each_ffn in enumerate(snapshot.ffns)]
        ModelChannels(browser).find(place.filter, np.concatenate(masks))
        return
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
        return input_path(options.protect)
    # The atlas is in the Hub cache, which is not a place for the user's files.
    return Path(default_protect_file(atlas).name) if options.file.startswith("hf://") else default_protect_file(atlas)
