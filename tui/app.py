"""The application: what is open, reloading, themes, and the keys that hold everywhere."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from textual import work
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.widgets import Input

from chanfmt.console import printable
from chanfmt.errors import AtlasError
from chanfmt.schema import METRIC_BY_NAME
from tui.keys import key_rows
from tui.load import Snapshot, file_signature, read_snapshot
from tui.model import Browser
from tui.screens.base import BrowserScreen
from tui.screens.choice import ChoiceScreen
from tui.screens.help import HelpScreen
from tui.screens.overview import OverviewScreen
from tui.themes import COLOURLESS_THEME, DARK_RAMP, LIGHT_RAMP, no_color
from tui.watch import Watcher
from tui.widgets.layer_table import LayerTable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from textual.screen import Screen

POLL_SECONDS = 2.0


class AtlasApp(App[None], inherit_bindings=False):
    """Browses one atlas. ``browser`` is what the screens show."""

    TITLE = "atlas-tui"
    ALLOW_SELECT = False
    CSS_PATH = "app.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "reload", "reload", tooltip="read the file again"),
        Binding("t", "theme", "theme", tooltip="choose a theme"),
        Binding("colon", "command_palette", "command", show=False, tooltip="every action by name"),
        Binding("ctrl+p", "command_palette", "command", show=False, priority=True, tooltip="every action by name"),
        Binding("ctrl+c", "quit", "quit", show=False, priority=True, tooltip="quit at once"),
        Binding("question_mark", "help", "help", tooltip="this help"),
    ]

    def __init__(self, snapshot: Snapshot) -> None:
        self.colourless = no_color()
        if not self.colourless:
            os.environ.pop("NO_COLOR", None)  # Set but empty means nothing; Textual would obey it.
        super().__init__(ansi_color=True if self.colourless else None)
        self.animation_level = "none"
        if self.colourless:
            self.theme = COLOURLESS_THEME
        self.browser = Browser(snapshot)
        self._watcher = Watcher(snapshot.signature)
        self._generation = 0

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
        return OverviewScreen(LayerTable(self.browser, self.ramp))

    def on_mount(self) -> None:
        self.set_interval(POLL_SECONDS, self.poll)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, partial(self.exit, return_code=128 + number))

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        for row in key_rows(screen):
            run = partial(self.run_action, row.action, row.node)
            yield SystemCommand(f"{row.sentence}  {' '.join(row.keys)}", "", run)

    # What is shown.

    def show(self, browser: Browser, notice: str = "") -> None:
        """Make ``browser`` what every screen shows."""
        self.browser = browser
        for screen in self.screen_stack:
            if isinstance(screen, BrowserScreen):
                screen.show_browser()
        if notice:
            self.say(notice)

    def say(self, notice: str) -> None:
        """Show ``notice`` in the status line of the screen in use."""
        [screen] = [screen for screen in self.screen_stack if isinstance(screen, BrowserScreen)][-1:]
        screen.say(notice)

    def leave_layer(self, ffn: int) -> None:
        """Go back to the overview, the cursor on ``ffn``."""
        self.pop_screen()
        if isinstance(self.screen, OverviewScreen):
            self.screen.show_ffn(ffn)

    def choose_metric(self) -> None:
        """Let the user choose the metric."""
        metrics = [(name, f"{METRIC_BY_NAME[name].heading:<10} {METRIC_BY_NAME[name].long_name}")
                   for name in self.browser.snapshot.metrics]
        self.push_screen(ChoiceScreen("metric", metrics, self.browser.metric), self._metric_chosen)

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

    # The clipboard.

    def copy(self, text: str) -> None:
        """To the terminal's clipboard, and to tmux's, which drops the terminal's by default."""
        self.copy_to_clipboard(text)
        if os.environ.get("TMUX"):
            self._copy_to_tmux(text)

    @work(thread=True)
    def _copy_to_tmux(self, text: str) -> None:
        try:
            subprocess.run(
                ["tmux", "load-buffer", "-w", "-"], input=text.encode(), capture_output=True, timeout=5, check=True
            )
        except (OSError, subprocess.SubprocessError):
            self.call_from_thread(self.say, "tmux did not take the copy")

    # Reading the file again.

    def action_reload(self) -> None:
        self._generation += 1
        self._read_again(self._generation)

    def poll(self) -> None:
        """Look at the file once; read it when a change has settled."""
        try:
            signature = file_signature(self.browser.snapshot.path)
        except OSError as error:
            self._keep(str(error.strerror))
            return
        if self._watcher.changed(signature):
            self.action_reload()

    @work(thread=True, exclusive=True, group="reload")
    def _read_again(self, generation: int) -> None:
        try:
            snapshot = read_snapshot(self.browser.snapshot.path)
        except AtlasError as error:
            self.call_from_thread(self._refused, generation, error.message)
        else:
            self.call_from_thread(self._accepted, generation, snapshot)

    def _accepted(self, generation: int, snapshot: Snapshot) -> None:
        if generation != self._generation:
            return
        self._watcher = Watcher(snapshot.signature)
        browser = Browser(snapshot, self.browser.metric, log_axis=self.browser.log_axis)
        self.show(browser, f"read again {snapshot.read_at:%H:%M:%S}")

    def _refused(self, generation: int, reason: str) -> None:
        if generation == self._generation:
            self._keep(reason)

    def _keep(self, reason: str) -> None:
        snapshot = self.browser.snapshot
        brief = reason.replace(str(snapshot.path), snapshot.path.name)
        self.say(f"kept what was read {snapshot.read_at:%H:%M:%S}: {printable(brief)}")
