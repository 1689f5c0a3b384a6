"""Which steps of a run are done: a small file in the work directory, whole after every change."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import msgspec

from chanfmt.base.errors import UsageError
from chanfmt.base.files import atomic_file
from chanfmt.base.inputs import file_size
from chanfmt.base.parsed import parse_json

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.cli.shrinking.steps import Step

FILE = "shrink.json"
FORMAT = "shrink/1"
_MAX_BYTES = 1 << 20


class Entry(msgspec.Struct):
    """What is known of one step.

    Attributes:
        command: Its command line.
        done: Whether the command ended well.
        seconds: Seconds that it took in the run in which it ended.
    """

    command: str
    done: bool = False
    seconds: float = 0.0


class _Stored(msgspec.Struct):
    format: str
    steps: dict[str, Entry]


class Journal:
    """The steps that were begun and done, by name.

    Args:
        directory: The work directory. It exists.

    Raises:
        UsageError: The directory's file cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE
        self.steps: dict[str, Entry] = {}
        if not os.path.lexists(self._path):
            return
        try:
            if file_size(self._path) > _MAX_BYTES:
                raise ValueError("it is too large")
            stored = parse_json(self._path.read_bytes(), _Stored)
            if stored.format != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
        except (OSError, ValueError) as error:
            raise UsageError(f"{self._path} cannot be read: {error}", hint="add --overwrite to begin again") from None
        self.steps = stored.steps

    def is_done(self, step: Step) -> bool:
        """Whether ``step`` need not run: it ended well, or it was killed after its whole output had appeared."""
        entry = self.steps.get(step.name)
        return entry is not None and entry.command == step.command and (entry.done or step.whole) and step.output.exists()

    def check(self, step: Step) -> None:
        """Refuse to put the output of ``step`` where another command's output is.

        Raises:
            UsageError: The step was begun with another command line.
        """
        if self.is_other(step):
            raise UsageError(
                f"{step.output} was made by another command: {self.steps[step.name].command}",
                hint="repeat that run, choose another -o, or add --overwrite to begin again",
            )

    def is_other(self, step: Step) -> bool:
        """Whether the output of ``step`` was made by another command line."""
        entry = self.steps.get(step.name)
        return entry is not None and entry.command != step.command and step.output.exists()

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its judgement."""
        return "evaluate" in self.steps and self.steps["evaluate"].done

    def begin(self, step: Step) -> None:
        """Note that ``step`` begins. What comes after it, in an earlier run, is no longer done."""
        names = list(self.steps)
        later = names[names.index(step.name) :] if step.name in names else []
        for name in later:
            del self.steps[name]
        self.steps[step.name] = Entry(step.command)
        self._write()

    def end(self, step: Step, seconds: float) -> None:
        """Note that ``step`` ended well."""
        self.steps[step.name] = Entry(step.command, True, round(seconds, 1))
        self._write()

    def _write(self) -> None:
        value = {"format": FORMAT, "steps": {name: msgspec.structs.asdict(entry) for name, entry in self.steps.items()}}
        with atomic_file(self._path, overwrite=True) as temporary:
            temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
