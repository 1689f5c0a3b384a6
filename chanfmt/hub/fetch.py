"""Fetch a file, or a repository, from the Hub into its cache, checked against what the Hub says of it."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from chanfmt.base.errors import CheckError, UsageError
from chanfmt.hub.digests import is_named
from chanfmt.hub.failures import hub_errors, is_unreachable, quiet_client, retried

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.hub.names import HubFile


@dataclass(frozen=True)
class Fetched:
    """A file in the cache.

    Attributes:
        path: Where it lies.
        source: Which file of which commit it is.
    """

    path: Path
    source: HubFile


def fetch(wanted: HubFile, *, suffix: str) -> Fetched:
    """The file ``wanted``, from the cache where it is there and the Hub has no other, or cannot be asked.

    Args:
        suffix: What the file's name ends with, where ``wanted`` names none and the repository has one.

    Raises:
        UsageError: ``wanted`` names no file, and the repository has none or several.
        HubError: It cannot be had.
        CheckError: What arrived is not what the Hub says of it.
    """
    from huggingface_hub import hf_hub_download

    with quiet_client(), hub_errors(wanted.repo, kind=wanted.kind, revision=wanted.revision):
        file = wanted.file or _only_file(wanted, suffix)
        path = Path(retried(lambda: hf_hub_download(wanted.repo, file, repo_type=wanted.kind, revision=wanted.revision)))
    # snapshots/<commit>/<file> is the cache's documented layout.
    commit = path.parents[file.count("/")].name
    _check(path, wanted.repo, file)
    return Fetched(path, replace(wanted, revision=commit, file=file))


def fetch_snapshot(
    repo: str,
    revision: str | None,
    *,
    wanted: Sequence[str],
    unwanted: Sequence[str],
) -> Path:
    """The files of a model at a commit, in a directory named after that; from the cache where they are there.

    Args:
        revision: Branch, tag or commit; None is the main branch.
        wanted, unwanted: Patterns of file names.

    Raises:
        UsageError: ``repo`` cannot be a name.
        HubError: They cannot be had.
        CheckError: What arrived is not what the Hub says of it.
    """
    from huggingface_hub import snapshot_download

    # A file's time may be a little behind the clock.
    started = time.time() - 1
    with quiet_client(), hub_errors(repo, revision=revision):
        folder = Path(
            retried(
                lambda: snapshot_download(repo, revision=revision, allow_patterns=[*wanted], ignore_patterns=[*unwanted]),
            )
        )
    for path in sorted(folder.rglob("*")):
        # What was there before was checked before; a large model takes minutes to read.
        if path.is_file() and path.stat().st_mtime >= started:
            _check(path, repo, path.relative_to(folder).as_posix())
    return folder


def _only_file(wanted: HubFile, suffix: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Listing files would wait long where there is no network.
        info = retried(lambda: HfApi().repo_info(wanted.repo, repo_type=wanted.kind, revision=wanted.revision))
        names = [item.rfilename for item in getattr(info, "siblings", None) or ()]
    except Exception as error:
        if not is_unreachable(error):
            raise
        try:
            names = _cached_files(wanted)
        except LocalEntryNotFoundError:
            raise error from None
    names = [name for name in names if name.endswith(suffix)]
    if len(names) != 1:
        found = f"{len(names)} {suffix} files: {', '.join(names)}" if names else f"no {suffix} file"
        raise UsageError(f"{wanted.repo} holds {found}", hint=f"name the file: {replace(wanted, file='FILE')}")
    return names[0]


def _cached_files(wanted: HubFile) -> list[str]:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(wanted.repo, repo_type=wanted.kind, revision=wanted.revision, local_files_only=True))
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def _check(path: Path, repo: str, file: str) -> None:
    """Compare a file of the cache with its digest, which is the name of the blob that it links to."""
    blob = path.resolve()
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return  # No links on this file system.
    if not is_named(blob, blob.name):
        path.unlink()
        blob.unlink()
        raise CheckError(
            f"{file} of {repo} arrived damaged: its digest is not the one that the Hub gives",
            hint="run the same command again; the damaged copy was removed from the cache",
        )
