"""Text to measure on: files, data sets, and the language reference that ships with Python.

A source gives *rows*. The text consists of its non-empty rows, joined by a blank line, as the paper joins the rows of
WikiText-2. In most data sets a row is a document of its own; calibration then keeps the documents apart
(`chanfmt.data.tokens`). If a source has splits, calibration reads one split and evaluation another.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from chanfmt.base.errors import UsageError, first_line
from chanfmt.base.inputs import input_path
from chanfmt.base.narrate import say
from chanfmt.data.published import NoParquetError, Place, texts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

FILES = (".txt", ".jsonl", ".parquet")
"""Suffixes of the files that can be read."""

ARRAYS = (".npz", ".safetensors")
"""Suffixes of files that hold arrays for the model's ``forward`` instead of text (`chanfmt.data.arrays`)."""

MAX_CHARACTERS = 16_000_000
"""Most characters taken from one source: all of WikiText-2, but only a part of C4."""

ALIASES = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", {"calibrate": "train", "evaluate": "test"}),
    "c4": ("allenai/c4", "en", {"calibrate": "train", "evaluate": "validation"}),
}
"""Short names of data sets: repository, configuration, split per purpose."""

LINES = ("Salesforce/wikitext", "wikitext")
"""Data sets whose rows are the lines of one text, not documents."""

SELF = "self"
"""The source that is not a text: sequences sampled from the measured model (`chanfmt.data.sampled`)."""

BOS = ("auto", "always", "never")
"""Values of ``--bos``: which special tokens are around each sequence (`chanfmt.data.special_tokens`)."""

_ALIKE = 0.75
"""Likeness of a word to a short name above which it is taken for a typing error."""

JOINT = "\n\n"
"""The text between two rows."""

PYDOC_HELD_OUT = 5
"""Every fifth topic of the language reference is kept for evaluation."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[^@/]+)?(@.+)?")
"""The name of a data set: NAME or USER/NAME, then its configuration and its split."""

_KINDS = "use wikitext2, c4, pydoc, a .txt, .jsonl or .parquet file, or a data set as NAME[:CONFIG][@SPLIT]"
_OTHER_FILES = (".csv", ".tsv", ".json", ".md", ".html", ".pdf", ".docx", ".gz", ".zst", ".h5", ".hdf5", ".npy", ".gguf", ".text")
"""Suffixes of files that people name, and that are no suffixes of data sets."""

Purpose = Literal["calibrate", "evaluate"]


@dataclass(frozen=True)
class Text:
    """The text of one source.

    Attributes:
        source: Name of the source, as the atlas records it.
        revision: SHA-256 of ``text``, hexadecimal. Together with the name it identifies what was read.
        text: The rows, joined by a blank line. Empty rows are left out unless they were asked for.
        documents: The rows, if each is a document of its own; empty if they are parts of one text.
        cut: Whether the source is longer than `MAX_CHARACTERS`.
    """

    source: str
    revision: str
    text: str
    documents: tuple[str, ...] = ()
    cut: bool = False


def read_text(source: str, purpose: Purpose, *, empty_rows: bool = False) -> Text:
    """Read the text of ``source``.

    Args:
        source: ``pydoc``, ``wikitext2``, ``c4``, a ``.txt``, ``.jsonl`` or ``.parquet`` file, or ``NAME[:CONFIG][@SPLIT]`` of
            any data set on the Hub with a ``text`` column. A ``.txt`` file is one row; the other files have a ``text`` column.
        purpose: Decides which split is read, if the source has several.
        empty_rows: Whether empty rows are joined too.

    Raises:
        UsageError: The source does not exist, cannot be read, has no text, or is `SELF`.
    """
    check_text(source)
    path = input_path(source)
    rows: Iterable[str]
    documents = False
    if source == "pydoc":
        name, rows = f"pydoc/{purpose}", _pydoc_rows(purpose)
    elif path.suffix in FILES:
        name, rows, documents = path.name, _file_rows(path), path.suffix != ".txt"
    else:
        name, rows, documents = _dataset_rows(source, purpose)
    # JSON can spell half a surrogate pair, which a tokenizer cannot take.
    kept, cut = _bounded(row.encode("utf-8", "replace").decode("utf-8") for row in rows if empty_rows or row.strip())
    if not any(row.strip() for row in kept):
        raise UsageError(f"the text source {source} is empty", hint="choose another file or data set")
    if cut:
        say(f"note: only the first {MAX_CHARACTERS:,} characters of {name} are used")
    text = JOINT.join(kept)
    return Text(name, hashlib.sha256(text.encode("utf-8")).hexdigest(), text, tuple(kept) if documents else (), cut)


def check_text(source: str) -> None:
    """Raise an error for a text source that `read_text` cannot read. Nothing is read, and the network is not used.

    Raises:
        UsageError: The file does not exist or is of another kind, or the source is `SELF`.
    """
    path = input_path(source)
    if source == SELF:
        raise UsageError(
            "self is sampled from the measured model, so every model would be measured on another text",
            hint="use wikitext2, pydoc, a file or a data set; self can be used with atlas build --calib only",
        )
    if path.suffix in ARRAYS:
        raise UsageError(
            f"{source} holds inputs of one model, not text", hint="such a file can be used with atlas build --calib only"
        )
    if source == "pydoc":
        return
    if path.suffix in FILES:
        if not os.path.isfile(path):
            raise UsageError(
                f"{path} is a directory, not a text file" if os.path.isdir(path) else f"the text file {path} does not exist"
            )
        return
    if os.path.exists(path):
        raise UsageError(f"{source} is not a text source", hint=_KINDS)
    if not _NAME.fullmatch(source):
        raise UsageError(
            f"{source!r} is neither a text file nor the name of a data set",
            hint=_KINDS,
        )
    if path.suffix.lower() in _OTHER_FILES:
        raise UsageError(f"the file {source} does not exist, and would not be a text source", hint=_KINDS)
    # A word like a short name is a typing error. A data set of the Hub has an owner, or a configuration.
    if not {"/", ":"} & set(source) and source not in ALIASES:
        meant = difflib.get_close_matches(source.lower(), (*ALIASES, "pydoc", SELF), n=1, cutoff=_ALIKE)
        if meant:
            raise UsageError(f"unknown text source {source!r}; did you mean {meant[0]}?", hint=_KINDS)


def _bounded(rows: Iterable[str]) -> tuple[list[str], bool]:
    """The rows that make up the first `MAX_CHARACTERS` characters, and whether there was more."""
    kept: list[str] = []
    room = MAX_CHARACTERS
    for row in rows:
        if room <= 0:
            return kept, True
        kept.append(row[:room])
        if len(row) > room:
            return kept, True
        room -= len(row) + len(JOINT)
    return kept, False


def _pydoc_rows(purpose: Purpose) -> list[str]:
    from pydoc_data.topics import topics

    held_out = {name for index, name in enumerate(sorted(topics)) if index % PYDOC_HELD_OUT == PYDOC_HELD_OUT - 1}
    if purpose == "evaluate":
        return [topics[name] for name in sorted(held_out)]
    # Topics overlap: "compound" holds most of "while". A topic that shares a paragraph with a held-out one is left out.
    seen = set().union(*(_paragraphs(topics[name]) for name in held_out))
    return [topics[name] for name in sorted(set(topics) - held_out) if not _paragraphs(topics[name]) & seen]


def _paragraphs(text: str) -> set[str]:
    """The paragraphs of ``text`` that are so long that two texts do not share one by chance."""
    return {paragraph for paragraph in text.split("\n\n") if len(paragraph) > 80}


def _file_rows(path: Path) -> Iterator[str]:
    try:
        if path.suffix == ".txt":
            with open(path, encoding="utf-8") as file:
                yield file.read(MAX_CHARACTERS + 1)
        elif path.suffix == ".jsonl":
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _json_row(line, f"{path}, line {number}")
        else:
            yield from _parquet_rows(path)
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None


def _json_row(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError(f"{where}: the line is not JSON") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UsageError(f"{where}: the line has no field 'text' with text")
    return row["text"]


def _parquet_rows(path: Path) -> Iterator[str]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise UsageError(f"{path} has no column 'text'")
            for batch in file.iter_batches(columns=["text"]):
                yield from (value for value in batch.column(0).to_pylist() if isinstance(value, str))
    except ArrowException as error:
        raise UsageError(f"{path} is not a readable parquet file: {first_line(error)}") from None


def _other_rows(source: str, place: Place, why: str) -> Iterator[str]:
    """Rows of a data set without parquet files, read with the package ``datasets`` if it is installed. Raises `UsageError`."""
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"the data set {source} cannot be read: {why}",
            hint="name a configuration and a split as NAME:CONFIG@SPLIT; or install what reads other files: pip install datasets",
        ) from None
    try:
        for row in datasets.load_dataset(place.repo, place.config or None, split=place.split, streaming=True):
            if "text" not in row:
                raise UsageError(f"the data set {source} has no column 'text'")
            if isinstance(row["text"], str):
                yield row["text"]
    except UsageError:
        raise
    # datasets, too, raises a dozen kinds of error.
    except Exception as error:
        raise _unreadable(source, error) from None


def _unreadable(source: str, error: Exception) -> UsageError:
    return UsageError(
        f"the data set {source} cannot be read ({type(error).__name__}: {first_line(error)})",
        hint="offline, use pydoc or a .txt, .jsonl or .parquet file",
    )


def _dataset_rows(source: str, purpose: Purpose) -> tuple[str, Iterator[str], bool]:
    """Name of the data set, its rows, and whether the rows are documents."""
    if source in ALIASES:
        name, config, splits = ALIASES[source]
        split = splits[purpose]
    else:
        rest, _, split = source.partition("@")
        name, _, config = rest.partition(":")
        split = split or ("train" if purpose == "calibrate" else "test")
    place = Place(name, config, split)

    def rows() -> Iterator[str]:
        try:
            yield from (value for value in texts(place) if isinstance(value, str))
        except KeyError:
            raise UsageError(f"the data set {source} has no column 'text'") from None
        except NoParquetError as error:
            yield from _other_rows(source, place, str(error))
        except UsageError:
            raise
        # huggingface_hub and pyarrow raise a dozen kinds of error for an unknown name, a lost connection or a bad file.
        except Exception as error:
            raise _unreadable(source, error) from None

    return "/".join(part for part in (name, config, split) if part), rows(), name not in LINES
