"""Fetch a file or a repository from the Hub into the Hub cache, and check it against the Hub's digests."""

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
        path: The file.
        source: Its address, with the commit.
    """

    path: Path
    source: HubFile


def fetch(wanted: HubFile, *, suffix: str) -> Fetched:
    """Fetch the file ``wanted``. The copy in the cache is used if it is current, or if the Hub cannot be reached.

    Args:
        suffix: Ending of the file's name, to find the file if ``wanted`` does not name it.

    Raises:
        UsageError: ``wanted`` does not name a file, and the repository does not have exactly one file with ``suffix``.
        HubError: The file cannot be fetched.
        CheckError: The file does not have the digest that the Hub gives.
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
    """Fetch the files of a model at a commit that are not in the cache. Returns the directory, named after the commit.

    Args:
        revision: Branch, tag or commit; None is the main branch.
        wanted, unwanted: Patterns of file names.

    Raises:
        UsageError: ``repo`` cannot be a name.
        HubError: The files cannot be fetched.
        CheckError: A file does not have the digest that the Hub gives.
    """
    from huggingface_hub import snapshot_download

    # The time of a file may be a little behind the clock.
    started = time.time() - 1
    with quiet_client(), hub_errors(repo, revision=revision):
        folder = Path(
            retried(
                lambda: snapshot_download(repo, revision=revision, allow_patterns=[*wanted], ignore_patterns=[*unwanted]),
            )
        )
    for path in sorted(folder.rglob("*")):
        # Older files were checked when they arrived, and reading a large model again takes minutes.
        if path.is_file() and path.stat().st_mtime >= started:
            _check(path, repo, path.relative_to(folder).as_posix())
    return folder


def _only_file(wanted: HubFile, suffix: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # This request fails quickly without a network; listing the files would wait long.
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
    """Compare a file of the cache with its digest, which is the name of the blob that the file links to."""
    blob = path.resolve()
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return  # This file system has no links, so the digest is not known.
    if not is_named(blob, blob.name):
        path.unlink()
        blob.unlink()
        raise CheckError(
            f"{file} of {repo} arrived damaged: its digest differs from the Hub's",
            hint="run the same command again; the damaged copy was removed from the cache",
        )
