"""The application: what is open, reloading, themes, and the keys that hold everywhere."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from textual import work
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.widgets import Input

from chanfmt.base.errors import AtlasError, ChanfmtError
from chanfmt.base.text import printable
from chanfmt.hub.locate import locate_atlas
from tui.screens.base import BrowserScreen
from tui.screens.card import CardScreen
from tui.screens.choice import ChoiceScreen
from tui.screens.compare import CompareScreen
from tui.screens.help import HelpScreen
from tui.screens.keys import key_rows
from tui.screens.layer import LayerScreen
from tui.screens.overview import ExpertsScreen, OverviewScreen
from tui.screens.protect import ProtectScreen
from tui.screens.scatter import ScatterScreen
from tui.screens.status import StatusScreen
from tui.screens.what_if import WhatIfScreen
from tui.session.comparison import check_comparable
from tui.session.load import Snapshot, file_signature, present_file, read_snapshot
from tui.session.marks import Marks
from tui.session.model import Browser
from tui.session.place import OF_TWO, Place, command, python
from tui.session.protect import NO_FILE, default_protect_file, read_marks, signature_of, write_marks
from tui.session.watch import Watcher
from tui.widgets.layer_table import LayerTable
from tui.widgets.themes import COLOURLESS_THEME, DARK_RAMP, LIGHT_RAMP, no_color

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from textual.screen import Screen

    from tui.session.load import Signature

POLL_SECONDS = 2.0
FORGET = "read it, and forget what is not written"


class AtlasApp(App[str], inherit_bindings=False):
    """Browses one atlas.

    Attributes:
        browser: What the screens show.
        marks: Channels marked for protection.
        atlas_name: The atlas as the user named it, for command lines.
        protect_file: Where the marks go.
        other: The atlas that it is compared with.

    Args:
        marks: FFN to those that ``protect_file`` holds, bool (channel,).
        protect_signature: The file's, from when they were read.
    """

    TITLE = "atlas-tui"
    ALLOW_SELECT = False
    CSS_PATH = "app.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "reload", "reload", tooltip="read the file again"),
        Binding("t", "theme", "theme", tooltip="choose a theme"),
        Binding("D", "dump", "dump", show=False, tooltip="quit, print as code"),
        Binding("colon", "command_palette", "command", show=False, tooltip="every action by name"),
        Binding("ctrl+p", "command_palette", "command", show=False, priority=True, tooltip="every action by name"),
        Binding("ctrl+c", "quit", "quit", show=False, priority=True, tooltip="quit at once"),
        Binding("question_mark", "help", "help", tooltip="this help"),
    ]

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        atlas_name: str = "",
        protect_file: Path | None = None,
        marks: dict[int, np.ndarray] | None = None,
        protect_signature: Signature = NO_FILE,
        other: Snapshot | None = None,
        place: Place | None = None,
    ) -> None:
        self.colourless = no_color()
        if not self.colourless:
            os.environ.pop("NO_COLOR", None)  # Set but empty means nothing; Textual would obey it.
        super().__init__(ansi_color=True if self.colourless else None)
        self.animation_level = "none"
        if self.colourless:
            self.theme = COLOURLESS_THEME
        self._place = place or Place(OF_TWO[0] if other else "overview")
        self._first = self._place.find(snapshot)
        self.browser = Browser(snapshot, self._place.metric, log_axis=not self._place.by_index)
        self.other = other
        self._watchers = [Watcher(snapshot.signature) for snapshot in self._shown]
        self._generation = 0
        self._last_words: str | None = None
        self.atlas_name = atlas_name or str(snapshot.path)
        self.protect_file = protect_file or default_protect_file(snapshot.path)
        self.marks = Marks([ffn.n_channels for ffn in snapshot.ffns], marks)
        self._protect_signature = protect_signature
        self._writing = False

    @property
    def ramp(self) -> tuple[str, ...]:
        """Colours of the heat strips; none for glyphs."""
        if self.colourless:
            return ()
        return DARK_RAMP if self.current_theme.dark else LIGHT_RAMP

    @property
    def file_name(self) -> str:
        return printable(self.browser.snapshot.path.name)

    def get_default_screen(self) -> Screen[None]:
        return OverviewScreen(LayerTable(self.browser, self.browser.snapshot.blocks, self.ramp), self._first)

    async def on_mount(self) -> None:
        self.set_interval(POLL_SECONDS, self.poll)
        for screen in self._screens(self._place):
            await self.push_screen(screen)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, partial(self.exit, return_code=128 + number))

    def _screens(self, place: Place) -> Iterator[Screen[Any]]:
        """What lies on the overview where ``place`` is shown, each made when the one before is there."""
        browser, ffn = self.browser, self._first
        if place.screen == "experts":
            yield ExpertsScreen(browser, ffn, self.ramp)
        elif place.screen in ("layer", "card", "scatter"):
            layer = LayerScreen(browser, ffn, channel=place.channel, sort=place.sort, filter_text=place.filter)
            yield layer
            if place.screen != "layer":
                yield CardScreen(layer) if place.screen == "card" else ScatterScreen(layer)
        elif place.screen in OF_TWO:
            yield CompareScreen(browser, ffn, then_join=place.filter if place.screen == "join" else None)
        elif place.screen == "protect":
            yield ProtectScreen(browser, ffn)
        elif place.screen == "what-if":
            yield WhatIfScreen(browser, ffn)

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        for row in key_rows(screen):
            run = partial(self.run_action, row.action, row.node)
            yield SystemCommand(f"{row.sentence}  {' '.join(row.keys)}", "", run)

    # What is shown.

    def show(self, browser: Browser, notice: str = "") -> None:
        """Make ``browser`` what every screen shows."""
        self.browser = browser
        for screen in self.screen_stack:
            if isinstance(screen, StatusScreen):
                screen.show_browser()
        if notice:
            self.say(notice)

    def say(self, notice: str) -> None:
        """Show ``notice`` in the status line of the screen in use."""
        [screen] = [screen for screen in self.screen_stack if isinstance(screen, StatusScreen)][-1:]
        screen.say(notice)

    def leave(self, span: range) -> None:
        """Go back by one screen, its cursor in ``span``, one FFN or all of a block."""
        self.pop_screen()
        snapshot = self.browser.snapshot
        if isinstance(self.screen, ExpertsScreen) and len(snapshot.block_around(span[0])) == 1:
            # From an expert one can walk to a layer that has none.
            self.pop_screen()
        if isinstance(self.screen, BrowserScreen) and self.screen.ffn not in span:
            self.screen.show_ffn(span[0])

    def open_span(self, span: range) -> None:
        """Show the channels of the one FFN in ``span``, or its experts."""
        if len(span) == 1:
            self.push_screen(LayerScreen(self.browser, span[0]))
        else:
            self.push_screen(ExpertsScreen(self.browser, span[0], self.ramp))

    def action_visit(self, name: str) -> None:
        """Go to the one screen ``name``: back to it where it is open below, in place of the other one, or on top."""
        kind = {"protect": ProtectScreen, "what_if": WhatIfScreen, "compare": CompareScreen}[name]
        here = self.screen
        if isinstance(here, kind) or not isinstance(here, BrowserScreen):
            return
        ffn = here.ffn
        if any(isinstance(screen, kind) for screen in self.screen_stack):
            while not isinstance(self.screen, kind):
                self.pop_screen()
        elif isinstance(here, ProtectScreen | WhatIfScreen | CompareScreen):
            self.switch_screen(kind(self.browser, ffn))
        else:
            self.push_screen(kind(self.browser, ffn))

    @work(thread=True, exclusive=True, group="other")
    def compare_with(self, name: str) -> None:
        """Open the atlas ``name`` and compare with it."""
        if not name:
            return
        try:
            path = locate_atlas(os.path.expanduser(name)).path
            other = read_snapshot(path, contained=True)
            check_comparable(self.browser.snapshot.path, path)
        except ChanfmtError as error:
            self.call_from_thread(self.say, printable(error.message))
        else:
            self.call_from_thread(self._have_other, other)

    def _have_other(self, other: Snapshot) -> None:
        self.other = other
        self._watchers = [self._watchers[0], Watcher(other.signature)]
        self._generation += 1
        self.action_visit("compare")

    def action_dump(self) -> None:
        self.action_leave_program(self._rebuilt())

    def _rebuilt(self) -> str:
        """The command line and the Python that rebuild what is shown."""
        [screen] = [screen for screen in self.screen_stack if isinstance(screen, BrowserScreen)][-1:]
        place = screen.place
        if isinstance(self.screen, CardScreen | ScatterScreen):
            place = replace(place, screen="card" if isinstance(self.screen, CardScreen) else "scatter")
        named, paths = [self.atlas_name], [str(snapshot.path) for snapshot in self._shown]
        named += paths[1:]
        if any(isinstance(below, CompareScreen) and below.swapped for below in self.screen_stack) and place.screen in OF_TWO:
            named, paths = named[::-1], paths[::-1]
        lines = [f"# {command(place, *named)}"]
        if isinstance(screen, WhatIfScreen):
            lines.append(f"# {screen.copy_text().strip()}")
        marked = np.flatnonzero(self.marks.of(screen.ffn)).tolist() if place.filter else []
        return "\n".join([*lines, python(place, *paths, marked=marked)])

    def action_leave_program(self, last_words: str | None = None) -> None:
        """Quit, and leave ``last_words`` in the terminal; ask once where marks are not written."""
        self._last_words = last_words
        if not sum(self.marks.unsaved):
            self.exit(last_words)
            return
        choices = [("stay", "stay"), ("write", f"write {self.protect_file.name} and quit"), ("quit", "quit without it")]
        self.push_screen(ChoiceScreen("marks are not written", choices, "stay"), self._leaving)

    def _leaving(self, choice: str | None) -> None:
        if choice == "write":
            self._write_or_ask(then_quit=True)
        elif choice == "quit":
            self.exit(self._last_words)

    def choose_metric(self) -> None:
        """Let the user choose the metric."""
        self.push_screen(ChoiceScreen("metric", self.metric_choices(), self.browser.metric), self._metric_chosen)

    def metric_choices(self) -> list[tuple[str, str]]:
        """Id and text of every metric, for a `ChoiceScreen`."""
        metrics = self.browser.snapshot.metrics
        return [
            (name, printable(f"{metric.heading:<10} {f'{name}: ' if '/' in name else ''}{metric.long_name}"))
            for name, metric in metrics.items()
        ]

    def _metric_chosen(self, metric: str | None) -> None:
        if metric is not None:
            self.show(Browser(self.browser.snapshot, metric, log_axis=self.browser.log_axis))

    def action_theme(self) -> None:
        themes = [(name, name) for name in sorted(self.available_themes)]
        self.push_screen(ChoiceScreen("theme", themes, self.theme), self._theme_chosen)

    def _theme_chosen(self, theme: str | None) -> None:
        if theme is not None:
            self.theme = theme

    def action_help(self) -> None:
        self.push_screen(HelpScreen(key_rows(self.screen)))

    def on_descendant_focus(self) -> None:
        # The palette's input, too, would write twice a second.
        if isinstance(self.focused, Input):
            self.focused.cursor_blink = False

    # Marks.

    def mark(self, channels: Mapping[int, np.ndarray], sentence: str, *, on: bool) -> None:
        """Mark, or unmark, FFN to channel ids, and say so."""
        changed = self.marks.mark(channels, sentence, on=on)
        self._marks_changed(f"{'marked' if on else 'unmarked'} {changed:,}" if changed else "nothing changed")

    def action_undo(self) -> None:
        change = self.marks.undo()
        self._marks_changed(f"undone: {change.sentence}" if change else "nothing to undo")

    def action_redo(self) -> None:
        change = self.marks.redo()
        self._marks_changed(f"redone: {change.sentence}" if change else "nothing to redo")

    def restore_marks(self) -> None:
        """Take back, as one change each way, what is not on disk."""
        for on, channels in zip((False, True), self.marks.differences(), strict=True):
            if channels:
                self.marks.mark(channels, "as written", on=on)
        self._marks_changed("as written")

    def _marks_changed(self, notice: str) -> None:
        for screen in self.screen_stack:
            if isinstance(screen, StatusScreen):
                screen.show_marks()
        self.say(notice)

    def action_write_marks(self) -> None:
        self._write_or_ask(then_quit=False)

    def _write_or_ask(self, *, then_quit: bool) -> None:
        if self._writing:
            self.say("still writing")
            return
        if signature_of(self.protect_file) == self._protect_signature:
            self._begin_to_write(then_quit=then_quit)
            return
        choices = [("stay", "leave it"), ("load", FORGET), ("write", f"write over it{' and quit' if then_quit else ''}")]
        title = f"{printable(self.protect_file.name)} has changed on disk"
        self.push_screen(ChoiceScreen(title, choices, "stay"), partial(self._conflict, then_quit=then_quit))

    def _conflict(self, choice: str | None, *, then_quit: bool) -> None:
        if choice == "write":
            self._begin_to_write(then_quit=then_quit)
        elif choice == "load":
            self._load(self.browser.snapshot)

    def _begin_to_write(self, *, then_quit: bool) -> None:
        self._writing = True
        self._write(self.browser.snapshot, self.marks, self.marks.masks, then_quit)

    @work(thread=True, group="write")
    def _write(self, snapshot: Snapshot, marks: Marks, masks: dict[int, np.ndarray], then_quit: bool) -> None:
        try:
            signature = write_marks(self.protect_file, snapshot, masks)
        except ChanfmtError as error:
            self.call_from_thread(self._not_written, printable(error.message))
        else:
            self.call_from_thread(self._written, marks, masks, signature, then_quit)

    def _not_written(self, reason: str) -> None:
        self._writing = False
        self.say(reason)

    def _written(self, marks: Marks, masks: dict[int, np.ndarray], signature: Signature, then_quit: bool) -> None:
        self._writing = False
        self._protect_signature = signature
        # Channels may have been marked while it was written, and FFNs moved.
        if marks is self.marks:
            marks.saved(masks)
        self._marks_changed(f"wrote {printable(self.protect_file.name)}")
        if then_quit:
            self.action_leave_program(self._last_words)

    def action_load_marks(self) -> None:
        if not sum(self.marks.unsaved) or signature_of(self.protect_file) == NO_FILE:
            self._load(self.browser.snapshot)
            return
        self.push_screen(ChoiceScreen("marks are not written", [("stay", "stay"), ("load", FORGET)], "stay"), self._loading)

    def _loading(self, choice: str | None) -> None:
        if choice == "load":
            self._load(self.browser.snapshot)

    @work(thread=True, exclusive=True, group="load")
    def _load(self, snapshot: Snapshot) -> None:
        try:
            masks, warnings, signature = read_marks(self.protect_file, snapshot)
        except ChanfmtError as error:
            self.call_from_thread(self.say, printable(error.message))
        else:
            self.call_from_thread(self._loaded, snapshot, masks, warnings, signature)

    def _loaded(self, snapshot: Snapshot, masks: dict[int, np.ndarray], warnings: tuple[str, ...], signature: Signature) -> None:
        name = printable(self.protect_file.name)
        if signature == NO_FILE:
            self.say(f"there is no {name}")
            return
        if snapshot.ffns != self.browser.snapshot.ffns:
            self._load(self.browser.snapshot)
            return
        self.marks = Marks(self.marks.widths, masks)
        self._protect_signature = signature
        self._marks_changed(printable(warnings[0]) if warnings else f"read {name}")

    # The clipboard.

    def copy(self, text: str) -> None:
        """To the terminal's clipboard, and to tmux's, which drops the terminal's by default."""
        self.copy_to_clipboard(text)
        if os.environ.get("TMUX"):
            self._copy_to_tmux(text)

    @work(thread=True)
    def _copy_to_tmux(self, text: str) -> None:
        try:
            subprocess.run(["tmux", "load-buffer", "-w", "-"], input=text.encode(), capture_output=True, timeout=5, check=True)
        except (OSError, subprocess.SubprocessError):
            self.call_from_thread(self.say, "tmux did not take the copy")

    # Reading the file again.

    @property
    def _shown(self) -> list[Snapshot]:
        return [self.browser.snapshot, *([] if self.other is None else [self.other])]

    def action_reload(self) -> None:
        self._generation += 1
        self._read_again(self._generation, self._shown)

    def poll(self) -> None:
        """Look at the files once; read them when a change has settled."""
        changed = False
        for snapshot, watcher in zip(self._shown, self._watchers, strict=True):
            try:
                changed |= watcher.changed(file_signature(present_file(snapshot.path)))
            except OSError as error:
                self._keep(snapshot, str(error.strerror))
        if changed:
            self.action_reload()

    @work(thread=True, exclusive=True, group="reload")
    def _read_again(self, generation: int, shown: list[Snapshot]) -> None:
        read: list[Snapshot | str] = []
        for place, snapshot in enumerate(shown):
            try:
                read.append(read_snapshot(snapshot.path, contained=place > 0))
            except AtlasError as error:
                read.append(error.message)
        self.call_from_thread(self._accept, generation, shown, read)

    def _accept(self, generation: int, shown: list[Snapshot], read: list[Snapshot | str]) -> None:
        """Show what could be ``read`` in place of ``shown``."""
        if generation != self._generation:
            return
        before = self.browser.snapshot
        snapshot, *others = [old if isinstance(new, str) else new for old, new in zip(shown, read, strict=True)]
        if others:
            [self.other] = others
        if snapshot.path != before.path:
            # What was being built is finished.
            self.atlas_name = str(snapshot.path)
        if snapshot.ffns != before.ffns:
            # A build that goes backwards adds FFNs in front.
            widths = [ffn.n_channels for ffn in snapshot.ffns]
            old, new = ([ffn.identity for ffn in each.ffns] for each in (before, snapshot))
            self.marks = self.marks.moved(old, new, widths)
        if any(isinstance(new, Snapshot) for new in read):
            browser = Browser(snapshot, self.browser.metric, log_axis=self.browser.log_axis)
            self.show(browser, f"read again {datetime.now():%H:%M:%S}")
        for place, found in enumerate(read):
            if isinstance(found, str):
                self._keep(shown[place], found)
            else:
                self._watchers[place] = Watcher(found.signature)

    def _keep(self, snapshot: Snapshot, reason: str) -> None:
        brief = reason.replace(str(snapshot.path), snapshot.path.name)
        self.say(f"kept what was read {snapshot.read_at:%H:%M:%S}: {printable(brief)}")
