"""Run the steps of `surgery shrink`, each in a process of its own, and note which are done."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from typing import IO, TYPE_CHECKING, Any

from chanfmt.base.child import ends_with_parent, interpreter
from chanfmt.base.errors import ChanfmtError, UsageError
from chanfmt.base.files import atomic_file, partial_beside
from chanfmt.base.narrate import say, warn
from surgery.cli.shrinking.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from surgery.cli.shrinking.steps import Places, Step

MODULES = {"atlas": "chanfmt", "surgery": "surgery"}
"""Name of a program to the module that ``python -m`` runs."""
_PATIENCE = 20.0
"""Seconds that an interrupted step gets to keep what it has."""
_WARNING = "warning: "
"""How a command begins a line with a warning."""
_MAX_SAID = 1 << 16
_LAST_LINES = 3
"""Lines of a step's message that an error repeats: the error, and what to do."""


class StepError(ChanfmtError):
    """A step failed. Its own message is above, or in this error's.

    Args:
        step: The step.
        code: Its exit code.
        again: What continues the run.
        said: Its message, if nobody has seen it.
    """

    def __init__(self, step: Step, code: int, again: str, said: str = "") -> None:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
        super().__init__(f"the step {step.name!r} {how}{said and f' ({said})'}: {step.command}", hint=again)
        self.exit_code = code if code in (1, 2) else 1


class Runner:
    """Runs the steps of one run in order.

    Args:
        places: The output and the work directory, which is made if it is missing.
        count: As the attribute.
        first: The first step, if it measures the model.
        overwrite: Begin again if the work directory holds a finished run, or a run that measured something else.
        shown: Whether the steps write to this process's stderr. If not, their warnings are logged here, and an error is told.
        quiet: Whether steps that are shown write warnings and errors only.

    Attributes:
        commands: The steps so far, as JSON-ready data.
        count: Number of steps, for people.

    Raises:
        UsageError: The work directory cannot be made, or its journal cannot be read.
    """

    def __init__(
        self, places: Places, count: int, first: Step | None, *, overwrite: bool, quiet: bool, shown: bool = True
    ) -> None:
        self.commands: list[dict[str, Any]] = []
        self.count = count
        self._places, self._overwrite, self._shown, self._quiet = places, overwrite, shown, quiet or not shown
        try:
            if overwrite and places.work.is_dir() and _is_past(places.work, first):
                shutil.rmtree(places.work)
            places.work.mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write {places.work}: {error.strerror}", hint="choose another -o") from None
        self._journal = Journal(places.work)

    def run(self, step: Step) -> None:
        """Run ``step`` unless it is done.

        Raises:
            UsageError: Its output was made by another command.
            StepError: It failed.
            KeyboardInterrupt: Ctrl-C, or SIGTERM.
        """
        number = f"[{len(self.commands) + 1}/{self.count}]"
        if self._journal.is_done(step):
            say(f"{number} {step.what}: done before")
            self._note(step)
            return
        if not self._overwrite:
            self._journal.check(step)
        elif self._journal.is_other(step):
            self._clear(step)
        say(f"{number} {step.what}:")
        say(f"  {step.command}")
        self._journal.begin(step)
        started = time.monotonic()
        again = f"what is done is in {self._places.work}; run the same command again to go on"
        with _stdout(step) as stdout, _stderr(shown=self._shown) as stderr:
            words = [*interpreter(), "-m", MODULES[step.words[0]], *_now(step), *(["--quiet"] if self._quiet else [])]
            code = _run(words, stdout, None if stderr is None else stderr.fileno(), again)
            said = [] if stderr is None else _said(stderr)
            for line in said:
                if line.startswith(_WARNING):
                    warn(line.removeprefix(_WARNING))
            if code:
                error = [line.strip() for line in said if not line.startswith(_WARNING)]
                raise StepError(step, code, again, "; ".join(error[-_LAST_LINES:]))
        self._journal.end(step, time.monotonic() - started)
        self._note(step)

    def _note(self, step: Step) -> None:
        self.commands.append({"step": step.name, "command": step.command, "seconds": self._journal.steps[step.name].seconds})

    def _clear(self, step: Step) -> None:
        """Remove what another command left in the work directory in the place of the output of ``step``."""
        if step.output.parent == self._places.work:
            step.output.unlink(missing_ok=True)
        elif step.output.parent.parent == self._places.work:
            shutil.rmtree(step.output.parent)


def _is_past(work: Path, first: Step | None) -> bool:
    """Whether the run in ``work`` is not to be continued: it is finished, it measured something else, or its journal is damaged."""
    try:
        journal = Journal(work)
    except UsageError:
        return True
    return journal.is_finished or (first is not None and journal.is_other(first))


@contextlib.contextmanager
def _stdout(step: Step) -> Iterator[int]:
    """A descriptor for what ``step`` prints. Its file appears whole, after the step ended well."""
    if step.stdout is None:
        yield subprocess.DEVNULL
        return
    with atomic_file(step.stdout, overwrite=True) as temporary, temporary.open("wb") as file:
        yield file.fileno()


@contextlib.contextmanager
def _stderr(*, shown: bool) -> Iterator[IO[bytes] | None]:
    """A file for what a step writes to stderr; None for this process's own."""
    if shown:
        yield None
        return
    with tempfile.TemporaryFile() as file:
        yield file


def _now(step: Step) -> list[str]:
    """The words of ``step`` behind its program, without --resume if nothing is there to continue, which the build would note."""
    begun = os.path.lexists(partial_beside(step.output))
    return [word for word in step.words[1:] if word != "--resume" or begun]


def _said(stderr: IO[bytes]) -> list[str]:
    """The last lines of what a step wrote to ``stderr``."""
    size = stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, size - _MAX_SAID))
    return [line for line in stderr.read().decode("utf-8", "replace").splitlines() if line.strip()]


def _run(words: list[str], stdout: int, stderr: int | None, again: str) -> int:
    """Run a command. Returns its exit code; an interrupt reaches it, and it may keep what it has."""
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, preexec_fn=ends_with_parent())
    try:
        return process.wait()
    except KeyboardInterrupt:
        # A terminal has sent Ctrl-C to the step as well, and a second signal would stop it from keeping its work.
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        raise KeyboardInterrupt(again) from None
