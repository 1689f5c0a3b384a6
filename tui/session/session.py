"""The session: what is open. Screens ask it for everything they show, and tell it what the user decided."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
from rich.cells import set_cell_size

from chanfmt.base.text import one_line
from chanfmt.hub.locate import locate_atlas
from tui.session.comparison import check_comparable
from tui.session.front import Front, Question
from tui.session.load import Snapshot, read_snapshot
from tui.session.marking import Marking
from tui.session.measuring import Measuring
from tui.session.model import Browser
from tui.session.pictures import Pictures
from tui.session.place import QUERY, Place, command, python
from tui.session.protect import NO_FILE, default_protect_file
from tui.session.registry import OF_TWO
from tui.session.reload import Reloader
from tui.session.texts import Texts

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tui.session.load import Signature
    from tui.session.marks import Marks


class Session:
    """One atlas, or two of one architecture, with a metric, marks, and the program that shows them.

    Args:
        snapshot: The atlas.
        atlas_name: The atlas as the user named it, for command lines (default: the path of ``snapshot``).
        protect_file: Where the marks go (default: `default_protect_file`).
        marks: FFN to the marks that ``protect_file`` holds, bool (channel,).
        protect_signature: The signature that ``protect_file`` had when the marks were read.
        other: The atlas to compare with.
        place: What is shown first.
        model: Where the model's tokenizer is (default: the model that the atlas names, if it is on this machine).

    Attributes:
        browser: What the screens show.
        other: The atlas to compare with, or None.
        marking: The marks and their file.
        measuring: The measurement of marked channels.
        texts: The texts of tokens.
        pictures: Figures for terminals that draw pixels.
        place: What was shown first.
        first_ffn: The FFN of ``place``.
        atlas_name: The atlas as the user named it.

    Raises:
        UsageError: ``place`` does not exist in ``snapshot``.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        atlas_name: str = "",
        protect_file: Path | None = None,
        marks: Mapping[int, np.ndarray] | None = None,
        protect_signature: Signature = NO_FILE,
        other: Snapshot | None = None,
        place: Place | None = None,
        model: str | None = None,
    ) -> None:
        self.place = place or Place(OF_TWO[0] if other else "overview")
        self.first_ffn = self.place.find(snapshot)
        self.browser = Browser(snapshot, self.place.metric, log_axis=not self.place.by_index)
        self.other = other
        self.atlas_name = atlas_name or str(snapshot.path)
        self.marking = Marking(self, protect_file or default_protect_file(snapshot.path), marks, protect_signature)
        self.measuring = Measuring(self)
        self.texts = Texts(self, model)
        self.pictures = Pictures(self)
        self._reloader = Reloader(self, self._have_again)
        self._last_words: str | None = None
        self._front: Front | None = None

    # The program around the session.

    @property
    def front(self) -> Front:
        assert self._front is not None, "attach comes first"
        return self._front

    def attach(self, front: Front) -> None:
        """Name the program that shows this session."""
        self._front = front

    def say(self, notice: str) -> None:
        """Show ``notice`` in the status line."""
        self.front.say(notice)

    # What is shown.

    @property
    def file_name(self) -> str:
        return one_line(self.browser.snapshot.path.name)

    @property
    def snapshots(self) -> list[Snapshot]:
        """The atlas, and the atlas to compare with if there is one."""
        return [self.browser.snapshot, *([] if self.other is None else [self.other])]

    def show(self, browser: Browser, notice: str = "") -> None:
        """Make ``browser`` what every screen shows."""
        self.browser = browser
        self.front.show_browser()
        if notice:
            self.say(notice)

    def metric_question(self, current: str, title: str = "metric") -> Question:
        """Every metric of the atlas, to choose one."""
        choices = [
            (name, one_line(f"{set_cell_size(metric.heading, 10)} {f'{name}: ' if '/' in name else ''}{metric.long_name}"))
            for name, metric in self.browser.snapshot.metrics.items()
        ]
        return Question(title, choices, current)

    def choose_metric(self) -> None:
        """Let the user choose the metric that the screens show."""
        self.front.ask(self.metric_question(self.browser.metric), self._metric_chosen)

    def _metric_chosen(self, metric: str | None) -> None:
        if metric is not None:
            self.show(Browser(self.browser.snapshot, metric, log_axis=self.browser.log_axis))

    # The other atlas.

    def compare_with(self, name: str) -> None:
        """Open the atlas ``name`` and compare with it; an empty name changes nothing."""
        if name:
            path = self.browser.snapshot.path
            self.front.start(lambda: _read_other(path, name), self._have_other, refused=self.say, group="other")

    def _have_other(self, other: Snapshot) -> None:
        self.other = other
        self._reloader.watch_other(other)
        self.front.visit("compare")

    # Marks.

    @property
    def marks(self) -> Marks:
        return self.marking.marks

    @property
    def protect_file(self) -> Path:
        return self.marking.path

    def mark(self, channels: Mapping[int, np.ndarray], sentence: str, *, on: bool) -> None:
        """Mark or unmark channels; ``channels`` maps an FFN to channel ids."""
        self.marking.mark(channels, sentence, on=on)

    # The files.

    def reload(self) -> None:
        """Read the files again."""
        self._reloader.reload()

    def poll(self) -> None:
        """Look at the files once, and read them again if a change has settled."""
        self._reloader.poll()
        self.measuring.poll()

    def open_instead(self, path: Path) -> None:
        """Show the atlas ``path``, which is the atlas shown so far with further columns."""

        def have(snapshot: Snapshot) -> None:
            self._have_again(snapshot, [])
            self._reloader.watch_first(snapshot)
            self.say("measured: the losses are on the cards")

        self.front.start(lambda: read_snapshot(path), have, refused=self.say, group="measured")

    def _have_again(self, snapshot: Snapshot, others: list[Snapshot]) -> None:
        """Show what was read again."""
        before = self.browser.snapshot
        if others:
            [self.other] = others
        if snapshot.path != before.path:
            # The build that was shown has finished, and its file has its final name.
            self.atlas_name = str(snapshot.path)
        if snapshot.ffns != before.ffns:
            # A build that goes backwards adds FFNs in front.
            self.marking.move(before, snapshot)
        browser = Browser(snapshot, self.browser.metric, log_axis=self.browser.log_axis)
        self.show(browser, f"read again {datetime.now():%H:%M:%S}")

    # The end.

    def rebuilt(self, place: Place, ffn: int, *, swapped: bool = False, comments: tuple[str, ...] = ()) -> str:
        """The command line and the Python code that rebuild ``place``.

        Args:
            ffn: The FFN of ``place``.
            swapped: Whether the other atlas is the first one on the screen.
            comments: Further command lines.
        """
        paths = [str(snapshot.path) for snapshot in self.snapshots]
        named = [self.atlas_name, *paths[1:]]
        if swapped:
            named, paths = named[::-1], paths[::-1]
        masks = [self.marks.of(each) for each in range(len(self.marks.widths))] if place.screen == QUERY else [self.marks.of(ffn)]
        marked = np.flatnonzero(np.concatenate(masks)).tolist() if place.filter else []
        # A name with a newline must not end the comment.
        lines = [f"# {one_line(line, len(line))}" for line in (command(place, *named), *comments)]
        return "\n".join([*lines, python(place, *paths, marked=marked)])

    def quit(self, last_words: str | None = None) -> None:
        """End the program, which then prints ``last_words``; ask first if marks are not saved."""
        self._last_words = last_words
        if self.measuring.running:
            choices = [("stay", "stay"), ("quit", "stop the measurement and quit; finished channels are kept")]
            self.front.ask(Question("a measurement is running", choices), self._stopping)
            return
        self._quit(last_words)

    def _stopping(self, choice: str | None) -> None:
        if choice == "quit":
            self._quit(self._last_words)

    def _quit(self, last_words: str | None) -> None:
        if not sum(self.marks.unsaved):
            self.front.exit(last_words)
            return
        name = one_line(self.protect_file.name)
        choices = [("stay", "stay"), ("write", f"write {name} and quit"), ("quit", "quit without writing")]
        self.front.ask(Question("some marks are not saved", choices), self._leaving)

    def _leaving(self, choice: str | None) -> None:
        if choice == "write":
            self.marking.write(then=lambda: self._quit(self._last_words))
        elif choice == "quit":
            self.front.exit(self._last_words)


def _read_other(first: Path, name: str) -> Snapshot:
    """The atlas ``name``, if it can be compared with the atlas at ``first``. Raises `ChanfmtError`."""
    path = locate_atlas(name).path
    other = read_snapshot(path, contained=True)
    check_comparable(first, path)
    return other
