"""The program: it mounts the screens of the registry over a session, and answers what the session and the screens ask."""

from __future__ import annotations

import os
from functools import partial
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from textual import on
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.driver import Driver
from textual.widgets import Input

from chanfmt.base.errors import ChanfmtError
from chanfmt.base.text import one_line
from tui.screens.base import BrowserScreen
from tui.screens.choice import ChoiceScreen
from tui.screens.help import HelpScreen
from tui.screens.keys import key_rows
from tui.screens.message import MessageScreen
from tui.screens.status import StatusScreen
from tui.session.clipboard import copy_to_tmux, in_tmux
from tui.session.front import Question
from tui.session.place import Opening
from tui.session.registry import ROW_OF, path_to
from tui.widgets.themes import COLOURLESS_THEME, DARK_RAMP, LIGHT_RAMP, no_color

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from textual import events
    from textual.screen import Screen
    from textual.widget import Widget

    from tui.session.session import Session

T = TypeVar("T")
POLL_SECONDS = 2.0


class AtlasApp(App[str], inherit_bindings=False):
    """Shows a session. It is the `tui.session.front.Front` of the session.

    Args:
        session: What is open.
        keymap: Name of each action that has other keys to its keys, separated by commas.

    Attributes:
        session: What is open.
        colourless: Whether the user asked for no colour.
    """

    TITLE = "atlas-tui"
    ALLOW_SELECT = False
    CSS_PATH = "app.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "reload", "reload", tooltip="read the file again", id="reload"),
        Binding("t", "theme", "theme", tooltip="choose a theme", id="theme"),
        Binding("D", "dump", "dump", show=False, tooltip="quit and print this view", id="dump"),
        Binding("colon", "command_palette", "command", show=False, tooltip="every action by name", id="palette"),
        Binding("ctrl+p", "command_palette", "command", show=False, priority=True, tooltip="every action by name"),
        Binding("ctrl+z", "suspend_process", "suspend", show=False, priority=True, tooltip="suspend (fg comes back)"),
        Binding("ctrl+c", "interrupt", "quit", show=False, priority=True, tooltip="quit (twice: at once)"),
        Binding("question_mark", "help", "help", tooltip="this help", id="help"),
    ]

    def __init__(
        self,
        session: Session,
        keymap: Mapping[str, str] | None = None,
        picture_widget: Callable[[bytes], Widget] | None = None,
    ) -> None:
        self.picture_widget = picture_widget
        self.colourless = no_color()
        if not self.colourless:
            os.environ.pop("NO_COLOR", None)  # An empty NO_COLOR means nothing, but Textual would obey it.
        super().__init__(ansi_color=True if self.colourless else None)
        self.animation_level = "none"
        if self.colourless:
            self.theme = COLOURLESS_THEME
        if keymap:
            self.set_keymap(keymap)
        self.session = session
        session.attach(self)

    @property
    def ramp(self) -> tuple[str, ...]:
        if self.colourless:
            return ()
        return DARK_RAMP if self.current_theme.dark else LIGHT_RAMP

    # Screens.

    def get_default_screen(self) -> Screen[None]:
        return self._made("overview", Opening(self.session.first_ffn, self.session.place))

    async def on_mount(self) -> None:
        self.set_interval(POLL_SECONDS, self.session.poll)
        for row in path_to(self.session.place.screen):
            await self.push_screen(self._made(row.name, Opening(self.session.first_ffn, self.session.place, self.screen)))

    def _made(self, name: str, opening: Opening) -> StatusScreen:
        screen: StatusScreen = resolve_name(ROW_OF[name].factory)(self.session, opening)
        return screen

    @property
    def _screens(self) -> list[StatusScreen]:
        """The open screens without dialogs, the lowest first."""
        return [screen for screen in self.screen_stack if isinstance(screen, StatusScreen)]

    def open(self, name: str, opening: Opening) -> None:
        self.push_screen(self._made(name, opening))

    def visit(self, name: str) -> None:
        here = self.screen
        if not isinstance(here, BrowserScreen):
            # The user has gone on to a list or a card since then.
            return
        names = [screen.SCREEN for screen in self._screens]
        if name in names:
            for _ in names[names.index(name) + 1 :]:
                self.pop_screen()
            return
        screen = self._made(name, Opening(here.ffn, self.session.place, here))
        if ROW_OF[here.SCREEN].key:
            self.switch_screen(screen)
        else:
            self.push_screen(screen)

    def leave(self, span: range) -> None:
        self.pop_screen()
        if isinstance(self.screen, StatusScreen):
            self.screen.come_back(span)

    def show_browser(self) -> None:
        for screen in self._screens:
            screen.show_browser()

    def show_marks(self) -> None:
        for screen in self._screens:
            screen.show_marks()

    def show_comparison(self) -> None:
        for screen in self._screens:
            screen.show_comparison()

    def say(self, notice: str) -> None:
        self._screens[-1].say(notice)

    def ask(self, question: Question, answer: Callable[[str | None], None]) -> None:
        self.push_screen(ChoiceScreen(question), answer)

    # Work and the clipboard.

    def start(
        self,
        work: Callable[[], T],
        then: Callable[[T], object],
        *,
        refused: Callable[[str], object],
        group: str,
        exclusive: bool = True,
    ) -> None:
        def run() -> None:
            try:
                result = work()
            except ChanfmtError as error:
                self.call_from_thread(refused, one_line(error.message))
            else:
                self.call_from_thread(then, result)

        self.run_worker(run, group=group, thread=True, exclusive=exclusive)

    def show_progress(self) -> None:
        self._screens[-1].paint_status()

    def show_text(self, title: str, lines: list[str]) -> None:
        self.push_screen(MessageScreen(title, lines))

    def copy(self, text: str) -> None:
        self.copy_to_clipboard(text)
        if in_tmux():
            self.start(lambda: copy_to_tmux(text), lambda _: None, refused=self.say, group="copy", exclusive=False)

    # Keys.

    async def run_action(self, action: Any, *args: Any, **kwargs: Any) -> bool:
        """Run ``action``. A count that the action has not used is gone after it."""
        table = self.screen.table if isinstance(self.screen, BrowserScreen) else None
        done = await super().run_action(action, *args, **kwargs)
        if table is not None and table.count and "digit" not in str(action):
            table.count = ""
        return done

    def action_interrupt(self) -> None:
        """End the program. The session asks first if marks are not saved; pressed again, the key ends the program at once."""
        if isinstance(self.screen, ChoiceScreen):
            self.exit()
        else:
            self.session.quit()

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        for row in key_rows(screen):
            run = partial(self.run_action, row.action, row.node)
            yield SystemCommand(f"{row.sentence}  {' '.join(row.keys)}", "", run)

    @on(Driver.SignalResume)
    def _come_back(self) -> None:
        """Paint everything after ctrl+z: the shell has written on the screen, and Textual paints changes only."""
        self.refresh(layout=True)

    def end(self, code: int) -> None:
        """End the program with the exit code ``code``. Any thread may call this."""
        self.exit(return_code=code)

    def exit(self, *args: Any, **kwargs: Any) -> None:
        # Nothing may go on without the program that shows it, however the program ends.
        self.session.measuring.stop()
        self.session.pictures.stop()
        super().exit(*args, **kwargs)

    def action_reload(self) -> None:
        self.session.reload()

    def action_theme(self) -> None:
        themes = [(name, name) for name in sorted(self.available_themes)]
        self.ask(Question("theme", themes, self.theme), self._theme_chosen)

    def _theme_chosen(self, theme: str | None) -> None:
        if theme is not None:
            self.theme = theme

    def action_dump(self) -> None:
        top = self._screens[-1]
        self.session.quit(self.session.rebuilt(top.place, top.ffn, swapped=top.swapped, comments=top.comments()))

    def action_help(self) -> None:
        self.push_screen(HelpScreen(key_rows(self.screen)))

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        # A blinking cursor, the palette's too, would write to the terminal twice a second. The event names the widget;
        # asking the app for it fails while the app closes and has no screen any more.
        if isinstance(event.widget, Input):
            event.widget.cursor_blink = False
