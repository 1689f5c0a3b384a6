"""Rows of a data set on the Hub, read from its parquet files with pyarrow and huggingface_hub alone.

Most data sets hold parquet files, or the Hub has converted them: the branch ``refs/convert/parquet`` has
``CONFIG/SPLIT/0000.parquet``, and ``CONFIG/partial-SPLIT/...`` of data sets of more than 5 GB
(https://huggingface.co/docs/dataset-viewer/parquet). Data sets that have neither need the package `datasets`.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import bars_shown

if TYPE_CHECKING:
    from collections.abc import Iterator

CONVERTED = "refs/convert/parquet"
"""The branch where the Hub keeps a parquet copy of a data set."""

LARGEST_DOWNLOAD = 64_000_000
"""Files of more bytes are read over the network, as far as they are needed. Smaller files go to the Hub cache."""

_SUFFIX = ".parquet"


@dataclass(frozen=True)
class Place:
    """One split of one configuration of a data set.

    Attributes:
        repo: Repository of the data set.
        config: Its configuration; empty for the only one or the default.
        split: Its split.
    """

    repo: str
    config: str
    split: str


class NoParquetError(Exception):
    """The data set has no parquet files of the split that was asked for."""


def texts(place: Place) -> Iterator[object]:
    """The values of the column ``text``, in order. A file is opened when its first row is needed.

    Raises:
        NoParquetError: There are no parquet files of that split.
        KeyError: The files have no such column.
        Exception: Anything that huggingface_hub and pyarrow raise if a file cannot be read.
    """
    from pyarrow import parquet

    revision, files = _find(place)
    for name, size in files:
        with _opened(place.repo, name, revision, size) as file, parquet.ParquetFile(file) as table:
            if "text" not in table.schema_arrow.names:
                raise KeyError("text")
            for batch in table.iter_batches(columns=["text"]):
                yield from batch.column(0).to_pylist()


def chosen(names: list[str], config: str, split: str) -> list[str]:
    """The files among ``names`` that hold ``split`` of ``config``, in order; empty if there are none.

    Splits are directories or the beginnings of names: ``CONFIG/train/0000.parquet``, ``CONFIG/partial-train/0000.parquet``,
    ``CONFIG/train-00000-of-00002.parquet``, ``data/train-00000-of-00001.parquet``.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        *folders, file = name.split("/")
        if not file.endswith(_SUFFIX):
            continue
        at_front = re.match(rf"(?:partial-)?{re.escape(split)}(?:[-_.]|$)", file)
        as_folder = folders and folders[-1] in (split, f"partial-{split}")
        if not at_front and not as_folder:
            continue
        above = folders[:-1] if as_folder else folders
        found.setdefault("/".join(above), []).append(name)
    if config:
        return next((files for where, files in found.items() if where.split("/")[-1] == config), [])
    plain = [where for where in found if where in ("", "data", "default")]
    return found[plain[0]] if plain else found.popitem()[1] if len(found) == 1 else []


def _find(place: Place) -> tuple[str, list[tuple[str, int]]]:
    """The revision that holds the files, and each file with its bytes."""
    for revision in ("main", CONVERTED):
        sizes = _listed(place.repo, revision)
        names = chosen(list(sizes), place.config, place.split)
        if names:
            return revision, [(name, sizes[name]) for name in names]
    raise NoParquetError(f"it has no parquet files of {'/'.join(part for part in (place.config, place.split) if part)}")


def _listed(repo: str, revision: str) -> dict[str, int]:
    """Parquet files of a revision with their bytes. Without a network, those in the Hub cache; empty if there is no such revision."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        tree = HfApi().list_repo_tree(repo, recursive=True, revision=revision, repo_type="dataset")
        return {item.path: int(item.size) for item in tree if item.path.endswith(_SUFFIX) and hasattr(item, "size")}
    except RevisionNotFoundError:
        return {}
    except RepositoryNotFoundError:
        raise
    except Exception:
        with contextlib.suppress(Exception):
            directory = Path(snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True))
            kept = {path.relative_to(directory).as_posix(): path.stat().st_size for path in directory.rglob(f"*{_SUFFIX}")}
            if kept:
                return kept
        raise


@contextlib.contextmanager
def _opened(repo: str, name: str, revision: str, size: int) -> Iterator[Any]:
    """A file of a data set, open for reading."""
    from huggingface_hub import HfFileSystem, hf_hub_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if size > LARGEST_DOWNLOAD:
        with HfFileSystem().open(f"datasets/{repo}/{name}", "rb", revision=revision) as file:
            yield file
        return
    disabled = are_progress_bars_disabled()
    if not bars_shown():
        disable_progress_bars()
    try:
        path = hf_hub_download(repo, name, repo_type="dataset", revision=revision)
    finally:
        if not disabled:
            enable_progress_bars()
    with open(path, "rb") as file:
        yield file
