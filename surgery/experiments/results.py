"""Rows of an experiment on disk, as JSON and CSV, complete after every row, and taken up again by the next run."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.errors import UsageError
from chanfmt.base.files import atomic_file
from chanfmt.base.text import spreadsheet_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from surgery.evaluation.perplexity import BlockLosses

JSON_FILE, CSV_FILE = "results.json", "results.csv"
LOSS_COLUMNS = ("perplexity", "nll", "standard_error", "tokens", "seconds", "block_nll", "block_predicted")


class Results:
    """The rows in a directory.

    Attributes:
        directory: Where they lie.
        identity: What all rows have in common.
        rows: Column to value, JSON-ready; ``key`` columns identify a row, and ``channels_sha256`` says what was removed.
    """

    def __init__(
        self,
        directory: Path,
        kind: str,
        identity: Mapping[str, Any],
        columns: Sequence[str],
        key: Sequence[str],
        *,
        overwrite: bool = False,
    ) -> None:
        """Take up the rows in ``directory``.

        Args:
            kind: Format of the JSON file.
            identity: What all rows have in common, JSON-ready.
            columns: Those of the CSV file; the JSON file has more.
            key: Columns that identify a row.
            overwrite: Drop rows that are there.

        Raises:
            UsageError: They are of something else, or unreadable; or the directory cannot be.
        """
        self.directory = directory
        self.rows: list[dict[str, Any]] = []
        self.identity = dict(identity)
        self._kind, self._columns, self._key = kind, tuple(columns), tuple(key)
        check_directory(directory)
        try:
            directory.mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write {directory}: {error.strerror}", hint="choose another -o") from None
        if (directory / JSON_FILE).exists() and not overwrite:
            self.rows = self._read()

    @property
    def files(self) -> tuple[Path, Path]:
        """The table and the whole."""
        return self.directory / CSV_FILE, self.directory / JSON_FILE

    def find(self, key: Mapping[str, Any], channels_sha256: str) -> dict[str, Any] | None:
        """The finished row of ``key``, if those channels were removed for it."""
        return next((row for row in self.rows if self._same(row, key) and row["channels_sha256"] == channels_sha256), None)

    def losses(self, channels_sha256: str) -> dict[str, Any] | None:
        """The `loss_columns` of a row that removed the same channels, whatever it is called."""
        row = next((row for row in self.rows if row["channels_sha256"] == channels_sha256), None)
        return None if row is None else {name: row[name] for name in LOSS_COLUMNS}

    def add(self, row: dict[str, Any]) -> None:
        """Put ``row`` at the end, in place of an earlier one with its key, and write both files.

        Raises:
            ChanfmtError: They cannot be written.
        """
        self.rows = [*(other for other in self.rows if not self._same(other, row)), row]
        self.write()

    def write(self, **extra: Any) -> None:
        """Write both files, each whole or not at all; ``extra`` goes into the JSON file."""
        head = {"format": self._kind, "identity": self.identity, **extra}
        with atomic_file(self.directory / JSON_FILE) as temporary:
            # A row a line: numbers of blocks, one a line, would bury them.
            fields = [f"{json.dumps(name)}: {_dumps(value)}" for name, value in head.items()]
            rows = ",\n".join(_dumps(row) for row in self.rows)
            temporary.write_text("{" + ",\n".join([*fields, f'"rows": [\n{rows}\n]']) + "}\n", encoding="utf-8")
        with atomic_file(self.directory / CSV_FILE) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {name: spreadsheet_text(value) if isinstance(value, str) else value for name, value in row.items()}
                for row in self.rows
            )

    def _same(self, row: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
        return all(row[name] == key[name] for name in self._key)

    def _read(self) -> list[dict[str, Any]]:
        path = self.directory / JSON_FILE
        hint = "choose another -o, or add --overwrite"
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["format"] != self._kind:
                raise UsageError(f"{path} holds {str(value['format'])[:40]!r} and not {self._kind!r}", hint=hint)
            identity, rows = value["identity"], value["rows"]
            needed = {*self._key, *self._columns, *LOSS_COLUMNS, "channels_sha256"}
            if not all(needed <= row.keys() for row in rows):
                raise ValueError("a row lacks columns")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"{path} is no results file: {error}", hint=hint) from None
        other = [name for name in self.identity if identity.get(name) != self.identity[name]]
        if other:
            raise UsageError(f"{path} was measured with another {', '.join(other)}", hint=hint)
        return rows


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def check_directory(directory: Path) -> None:
    """Raise `UsageError` where no results can go into ``directory``, which need not exist yet."""
    parent = directory.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"the directory {parent} does not exist", hint=f"create it with: mkdir -p {parent}")
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file", hint="choose another -o")


def channels_sha256(removed: Mapping[int, np.ndarray], means: Mapping[int, np.ndarray] | None = None, refit: str = "") -> str:
    """SHA-256 of which channels are removed, of what stands in for them, and of how the others were refitted."""
    digest = hashlib.sha256(refit.encode())
    for index in sorted(removed):
        if removed[index].any():
            digest.update(f"{index}{removed[index].shape}".encode() + np.packbits(removed[index]).tobytes())
            if means is not None:
                digest.update(np.where(removed[index], means[index], 0.0).astype("<f8").tobytes())
    return digest.hexdigest()


def loss_columns(losses: BlockLosses, seconds: float) -> dict[str, Any]:
    """`LOSS_COLUMNS` of a row; numbers that are not finite become None."""
    values = (
        finite(losses.perplexity),
        losses.mean,
        finite(losses.standard_error),
        int(losses.predicted.sum()),
        round(seconds, 3),
        losses.nll.tolist(),
        losses.predicted.tolist(),
    )
    return dict(zip(LOSS_COLUMNS, values, strict=True))


def losses_of(row: Mapping[str, Any]) -> BlockLosses:
    """The losses that `loss_columns` put into ``row``."""
    from surgery.evaluation.perplexity import BlockLosses

    return BlockLosses(np.array(row["block_nll"], dtype=np.float64), np.array(row["block_predicted"], dtype=np.int64))


def finite(value: float) -> float | None:
    """``value``, or None where JSON has no name for it."""
    return value if math.isfinite(value) else None
