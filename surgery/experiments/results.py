"""Rows of an experiment, in memory or in a directory as JSON and CSV. The files are complete after every row."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from typing import TYPE_CHECKING, Any

from chanfmt.base import html
from chanfmt.base.claims import claimed
from chanfmt.base.errors import UsageError
from chanfmt.base.files import atomic_file
from chanfmt.base.text import spreadsheet_text
from surgery.experiments.columns import LOSS_COLUMNS
from surgery.experiments.stored import Stored, check_rows, read_stored
from surgery.result.names import REPORT_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

JSON_FILE, CSV_FILE = "results.json", "results.csv"
_HINT = "choose another -o, or add --overwrite"


class Results:
    """The rows of an experiment.

    Attributes:
        directory: Directory of the files; None if the rows are in memory only.
        identity: What all rows have in common, JSON-ready.
        rows: Column to value, JSON-ready. The key columns identify a row, and ``channels_sha256`` says what was removed.
    """

    def __init__(
        self,
        directory: Path | None,
        kind: str,
        identity: Mapping[str, Any],
        columns: Sequence[str],
        key: Sequence[str],
        *,
        overwrite: bool = False,
    ) -> None:
        """Begin with the rows that ``directory`` holds.

        Args:
            directory: Directory for the files; None to keep the rows in memory.
            kind: Format of the JSON file.
            identity: What all rows have in common, JSON-ready.
            columns: Columns of the CSV file. The JSON file has more.
            key: Columns that identify a row.
            overwrite: Drop the rows that ``directory`` holds.

        Raises:
            UsageError: The rows in ``directory`` were measured differently or cannot be read, or the directory cannot be made.
        """
        self.directory = directory
        self.rows: list[dict[str, Any]] = []
        self.identity = dict(identity)
        self._kind, self._columns, self._key = kind, tuple(columns), tuple(key)
        if directory is None:
            return
        check_directory(directory)
        try:
            directory.mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write {directory}: {error.strerror}", hint="choose another -o") from None
        if os.path.exists(directory / JSON_FILE) and not overwrite:
            self.rows = self._read(directory / JSON_FILE)

    def __repr__(self) -> str:
        place = "in memory" if self.directory is None else f"in {str(self.directory)!r}"
        return f"<Results {self._kind}: {len(self.rows)} rows {place}>"

    def _repr_html_(self) -> str:
        return html.table(self._columns, [[_cell(row[name]) for name in self._columns] for row in self.rows])

    @property
    def files(self) -> tuple[Path, ...]:
        """The CSV file and the JSON file; none if the rows are in memory only."""
        return () if self.directory is None else (self.directory / CSV_FILE, self.directory / JSON_FILE)

    def find(self, key: Mapping[str, Any], channels_sha256: str) -> dict[str, Any] | None:
        """The finished row of ``key``, if the same channels were removed for it."""
        return next((row for row in self.rows if self._same(row, key) and row["channels_sha256"] == channels_sha256), None)

    def losses(self, channels_sha256: str) -> dict[str, Any] | None:
        """The `LOSS_COLUMNS` of any row for which the same channels were removed."""
        row = next((row for row in self.rows if row["channels_sha256"] == channels_sha256), None)
        return None if row is None else {name: row[name] for name in LOSS_COLUMNS}

    def add(self, row: dict[str, Any]) -> None:
        """Append ``row``, remove an earlier row with the same key, and write both files.

        Raises:
            ChanfmtError: The files cannot be written.
        """
        self.rows = [*(other for other in self.rows if not self._same(other, row)), row]
        self.write()

    def write(self, **extra: Any) -> None:
        """Write both files, each of them whole or not at all. ``extra`` goes into the JSON file."""
        if self.directory is None:
            return
        head = {"format": self._kind, "identity": self.identity, **extra}
        with atomic_file(self.directory / JSON_FILE, overwrite=True) as temporary:
            # Each row is one line. With one number per line, the losses of the blocks would bury everything else.
            fields = [f"{json.dumps(name)}: {_dumps(value)}" for name, value in head.items()]
            rows = ",\n".join(_dumps(row) for row in self.rows)
            temporary.write_text(
                "{" + ",\n".join([*fields, f'"rows": [\n{rows}\n]']) + "}\n", encoding="utf-8", errors="backslashreplace"
            )
        with (
            atomic_file(self.directory / CSV_FILE, overwrite=True) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ):
            writer = csv.DictWriter(file, self._columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {name: spreadsheet_text(value) if isinstance(value, str) else value for name, value in row.items()}
                for row in self.rows
            )

    def interrupted(self) -> KeyboardInterrupt:
        """What to raise on Ctrl-C: its text says what was kept."""
        if self.directory is None:
            return KeyboardInterrupt()
        return KeyboardInterrupt(f"{len(self.rows)} finished rows are in {self.directory}; run the same command to continue")

    def _same(self, row: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
        return all(row[name] == key[name] for name in self._key)

    def _read(self, path: Path) -> list[dict[str, Any]]:
        stored = read_rows(path, self._kind)
        try:
            check_rows(stored.rows, (*self._key, *self._columns))
        except ValueError as error:
            raise UsageError(f"{path} is not a results file: {error}", hint=_HINT) from None
        other = [name for name in self.identity if stored.identity.get(name) != self.identity[name]]
        if other:
            raise UsageError(f"{path} was measured with another {', '.join(other)}", hint=_HINT)
        return stored.rows


def check_directory(directory: Path, kind: str = "", *, overwrite: bool = False) -> None:
    """Raise `UsageError` if ``directory`` cannot hold results. It need not exist yet; its parent must.

    Args:
        kind: Format of the rows. If it is given, rows that are there already must be readable and of this format.
        overwrite: Whether rows that are there already will be dropped.
    """
    parent = directory.absolute().parent
    if not os.path.isdir(parent):
        raise UsageError(f"the directory {parent} does not exist", hint=f"create it with: mkdir -p {parent}")
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise UsageError(f"{directory} is a file", hint="choose another -o")
    if os.path.exists(directory / REPORT_FILE) or os.path.exists(directory / "config.json"):
        raise UsageError(f"{directory} holds a model, and no rows belong beside it", hint="choose another -o")
    if kind and not overwrite and os.path.exists(directory / JSON_FILE):
        read_rows(directory / JSON_FILE, kind)


def read_rows(path: Path, kind: str) -> Stored:
    """Read rows of the format ``kind``. Their columns are not checked yet. Raises `UsageError`."""
    try:
        stored = read_stored(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a results file: {error}", hint=_HINT) from None
    if stored.format != kind:
        raise UsageError(f"{path} holds {stored.format[:40]!r} and not {kind!r}", hint=_HINT)
    return stored


def claim(directory: Path | None) -> AbstractContextManager[None]:
    """The claim on ``directory``: two experiments that write to one directory would each lose the other's rows."""
    return contextlib.nullcontext() if directory is None else claimed(directory)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
