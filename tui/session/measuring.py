"""Measuring what the marked channels cost: ``surgery ablate channels`` in a process of its own, so that the browser needs no torch."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from chanfmt.algebra.rewrite import measured_sha256
from chanfmt.base.child import ends_with_parent, interpreter
from chanfmt.base.errors import ChanfmtError
from chanfmt.base.text import one_line
from chanfmt.format.columns import ABLATION_LOSS
from tui.session.front import Host, Question
from tui.session.load import reopened
from tui.session.protect import write_marks

if TYPE_CHECKING:
    from tui.session.load import Snapshot
    from tui.session.marks import Marks

PATIENCE = 1.5
"""Seconds that the process has to end after it was asked to. The browser itself has two to end."""
KEPT_LINES = 400
"""Lines of what the process says that are kept."""


@dataclass(frozen=True)
class Wish:
    """What the user wants measured, and on what.

    Attributes:
        model: The model, as after ``--model``; empty for the model that the atlas names.
        data: The text, as after ``--data``.
        seq_len: Tokens in a block.
        max_tokens: Tokens of the text to use at most; 0 means all.
    """

    model: str
    data: str
    seq_len: int
    max_tokens: int

    @property
    def directory(self) -> str:
        """Ending of the directory of the rows: rows that were measured on another text cannot be in the same directory."""
        return f"-ablation-{re.sub(r'[^A-Za-z0-9]+', '-', self.data).strip('-')[-40:]}-{self.max_tokens or 'all'}"


def command(atlas: str, wish: Wish, marks: Path, rows: Path, store: Path, *, replace: bool) -> list[str]:
    """The command line that measures the channels in the protect file ``marks`` one by one.

    Args:
        rows: Directory for the rows.
        store: Atlas to write.
        replace: Whether numbers that the atlas has already are replaced.
    """
    # With =, no value is taken for an option.
    return [
        *(*interpreter(), "-m", "surgery", "ablate", "channels", os.path.abspath(atlas)),
        *(f"--output={rows.absolute()}", f"--select={marks}", f"--data={wish.data}", f"--seq-len={wish.seq_len}"),
        *(f"--max-tokens={wish.max_tokens}", f"--store={store.absolute()}"),
        *((f"--model={wish.model}",) if wish.model else ()),
        *(("--replace",) if replace else ()),
    ]


class Process:
    """A command that runs beside the browser. Several threads may use it.

    Attributes:
        lines: The last lines that it has printed on stderr.
    """

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False
        self._lock = threading.Lock()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def run(self, arguments: list[str]) -> int:
        """Run the command ``arguments`` to its end and return its exit code; 0 if it was stopped before it began."""
        with self._lock:
            if self._stopped:
                return 0
            # A group of its own: what the process starts ends with it, and ctrl+c in the terminal reaches only the browser.
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                preexec_fn=ends_with_parent(),
            )
        assert self._process.stderr is not None
        with self._process:
            for line in self._process.stderr:
                self.lines.append(one_line(line.rstrip(), 2000))
        return self._process.returncode

    def stop(self) -> None:
        """End the command, as ctrl+c does; kill it if it does not end in time."""
        with self._lock:
            self._stopped = True
            process = self._process
        if process is not None and process.poll() is None:
            self._send(process, signal.SIGINT)
            timer = threading.Timer(PATIENCE, self._send, (process, signal.SIGKILL))
            timer.daemon = True
            timer.start()

    @staticmethod
    def _send(process: subprocess.Popen[str], number: signal.Signals) -> None:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)


class Asker(Host, Protocol):
    """A session, as far as a measurement sees it."""

    atlas_name: str

    @property
    def marks(self) -> Marks: ...

    def open_instead(self, path: Path) -> None:
        """Show the atlas ``path``, which is the atlas shown so far with further columns."""


class Measuring:
    """The measurement of a session: at most one at a time.

    Attributes:
        wish: What the user asked for last, which the next question begins with.
    """

    def __init__(self, host: Asker) -> None:
        self._host = host
        snapshot = host.snapshots[0]
        self.wish = Wish(_known_model(snapshot), _known_text(snapshot), snapshot.seq_len, 16 * snapshot.seq_len)
        self._process: Process | None = None
        self._rows = Path()
        self._rows_before = 0
        self._channels = 0
        self._progress = ""

    @property
    def running(self) -> bool:
        """Whether a measurement runs."""
        return self._process is not None

    @property
    def progress(self) -> str:
        """How far the measurement is, in a few words; empty if none runs."""
        return self._progress

    @property
    def marked(self) -> int:
        """Number of marked channels."""
        return sum(self._host.marks.counts)

    def refusal(self) -> str:
        """Why nothing can be measured now; empty if something can."""
        snapshot = self._host.snapshots[0]
        if snapshot.status != "complete":
            return "the build of this atlas is not finished"
        return "" if self.marked else "no channel is marked: the marked channels are measured one by one"

    def begin(self, wish: Wish) -> None:
        """Measure the marked channels; ask first if the atlas has measured numbers already."""
        self.wish = wish
        snapshot, marks = self._host.snapshots[0], self._host.marks
        masks = marks.masks
        if ABLATION_LOSS not in snapshot.metrics:
            self._start(masks, replace=False)
            return
        new = {
            ffn: mask & ~np.isfinite(snapshot.values(ffn, ABLATION_LOSS)) if mask.any() else mask for ffn, mask in masks.items()
        }
        others = sum(int(mask.sum()) for mask in new.values())
        question = Question(
            f"the atlas has numbers of {self.marked - others:,} of the {self.marked:,} channels",
            [
                ("stay", "measure nothing"),
                *([("others", f"measure the other {others:,}; the same text is needed")] if others else []),
                ("again", f"measure all {self.marked:,}; numbers from another text are dropped"),
            ],
        )

        def answer(choice: str | None) -> None:
            if choice in ("others", "again"):
                self._start(new if choice == "others" else masks, replace=choice == "again")

        self._host.front.ask(question, answer)

    def _start(self, masks: dict[int, np.ndarray], *, replace: bool) -> None:
        snapshot, wish, process = self._host.snapshots[0], self.wish, Process()
        # An atlas from the Hub is in the Hub cache, which is not a place for the user's files.
        beside = Path() if self._host.atlas_name.startswith("hf://") else snapshot.path.parent
        stem = snapshot.path.name.removesuffix(".h5")
        store = beside / f"{stem}-measured.h5" if self._host.atlas_name.startswith("hf://") else snapshot.path
        # Rows of another atlas of that name cannot be in the same directory.
        with reopened(snapshot) as atlas:
            digest = measured_sha256(atlas)[:8]
        self._process, self._rows = process, beside / f"{stem}{wish.directory}-{digest}"
        self._rows_before = _rows_in(self._rows)
        self._channels = sum(int(mask.sum()) for mask in masks.values())
        self._say(f"measuring {self._channels:,} ch")

        def work() -> int:
            with tempfile.TemporaryDirectory(prefix="atlas-tui-") as directory:
                chosen = Path(directory) / "marks.json"
                write_marks(chosen, snapshot, masks)
                try:
                    return process.run(command(str(snapshot.path), wish, chosen, self._rows, store, replace=replace))
                except OSError as error:
                    raise ChanfmtError(f"surgery could not be started: {error.strerror}") from None

        self._host.front.start(
            work,
            lambda code: self._ended(process, code, store),
            refused=self._failed,
            group="measure",
            exclusive=False,
        )

    def poll(self) -> None:
        """Look how far the measurement is, and show it."""
        if self._process is None or self._process.stopped:
            return
        # The first row is the dense model.
        done = max(0, _rows_in(self._rows) - self._rows_before - (self._rows_before == 0))
        loading = next((line for line in reversed(self._process.lines) if line), "")
        text = f"measuring {min(done, self._channels):,}/{self._channels:,} ch"
        self._say(text if done or not loading else f"{text}, {loading[:40]}")

    def _say(self, progress: str) -> None:
        if progress != self._progress:
            self._progress = progress
            self._host.front.show_progress()

    def offer_to_stop(self) -> None:
        """Ask whether the measurement should stop."""
        question = Question(self._progress or "measuring", [("stay", "go on"), ("stop", "stop; finished channels are kept")])
        self._host.front.ask(question, self._answered)

    def _answered(self, choice: str | None) -> None:
        if choice == "stop" and self._process is not None:
            self.stop()
            self._say("stopping")

    def stop(self) -> None:
        """Stop the measurement, if one runs."""
        if self._process is not None:
            self._process.stop()

    def _failed(self, reason: str) -> None:
        self._process, self._progress = None, ""
        self._host.say(reason)

    def _ended(self, process: Process, code: int, store: Path) -> None:
        self._process, self._progress = None, ""
        if process.stopped:
            self._host.say("stopped; a measurement of the same text goes on from here")
        elif code:
            self._host.say("the measurement failed")
            self._host.front.show_text("the measurement failed", list(process.lines) or [f"surgery ended with exit code {code}"])
        else:
            self._host.open_instead(store)


def _rows_in(directory: Path) -> int:
    """Rows of an experiment that are in ``directory``."""
    try:
        return max(0, (directory / "results.csv").read_bytes().count(b"\n") - 1)
    except OSError:
        return 0


def _known_model(snapshot: Snapshot) -> str:
    """The model, if the atlas says where it is: a name on the Hub, or a path that exists."""
    name = snapshot.model_id
    return name if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) or os.path.exists(name) else ""


def _known_text(snapshot: Snapshot) -> str:
    """The rest of the calibration text, if some of it is held out."""
    name = next((source.partition("/")[0] for source in snapshot.sources), "")
    return name if name in ("pydoc", "wikitext2", "c4") else "wikitext2"
