"""Publish a folder as a repository on the Hub: create, upload, read back, and only then show it to others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import CheckError, UsageError
from chanfmt.base.narrate import say
from chanfmt.hub.digests import is_content
from chanfmt.hub.failures import hub_errors, no_token, quiet_client, retried
from chanfmt.hub.names import check_repo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

KEPT = (".gitattributes",)
"""Files that the Hub itself puts into a repository."""


@dataclass(frozen=True)
class VisibilityOptions:
    """Who sees what is published, and whether the repository's owner is asked first."""

    public: bool = field(default=False, metadata={"help": "let others see the repository"})
    create_pr: bool = field(
        default=False,
        metadata={
            "help": "open a pull request in a repository that exists, in place of a commit",
            "flag": "--pr",
        },
    )


@dataclass(frozen=True)
class PublishOptions(VisibilityOptions):
    """How a folder is published."""

    overwrite: bool = field(
        default=False,
        metadata={
            "help": "take the place of what the repository holds; its history keeps that",
        },
    )


@dataclass(frozen=True)
class Published:
    """What was published.

    Attributes:
        repo: ``USER/NAME``.
        url: Page of the repository, or of the pull request.
        commit: Commit that holds the folder.
    """

    repo: str
    url: str
    commit: str


def publish_folder(
    folder: Path,
    repo: str,
    *,
    kind: str,
    message: str,
    options: PublishOptions,
    names: Iterable[str] | None = None,
) -> Published:
    """Make a repository hold what ``folder`` holds, check that it does, and say where.

    What an earlier call uploaded is not uploaded again. A new repository is private until the check has passed.

    Args:
        repo: ``USER/NAME``, or ``NAME`` of the logged-in user's.
        kind: ``model`` or ``dataset``.
        message: Of the commit, or title of the pull request.
        names: Paths below ``folder`` of the files that are meant; None for all.

    Raises:
        UsageError: The name is none, or the repository cannot be used as asked.
        HubError: The Hub refused or could not be reached. What is in ``folder`` is untouched.
        CheckError: The Hub holds something else than ``folder`` afterwards.
    """
    from huggingface_hub import HfApi, get_token

    check_repo(repo)
    files = _files(folder) if names is None else {name: folder / name for name in sorted(names)}
    if get_token() is None:
        raise no_token()
    api, repo = HfApi(), full_name(repo)
    with quiet_client(), hub_errors(repo, kind=kind, writing=True):
        target = _Target(api, repo, kind)
        hidden = target.prepare(files, options)
        commit, url = target.upload(files, message, options)
        target.check(files, commit, alone=not options.create_pr)
        if options.public and hidden:
            retried(lambda: api.update_repo_settings(repo, private=False, repo_type=kind))
            say(f"{repo} is public now")
    return Published(repo, url, commit)


def _files(folder: Path) -> dict[str, Path]:
    """Path in the repository to file, of all but what git and the Hub's client keep in a folder for themselves."""
    from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: found[name] for name in filter_repo_objects(found, ignore_patterns=DEFAULT_IGNORE_PATTERNS)}


def full_name(repo: str) -> str:
    """``repo`` with the logged-in user's name before it where it has none. Raises `HubError`."""
    if "/" in repo:
        return repo
    from huggingface_hub import HfApi

    with hub_errors(repo, writing=True):
        return f"{retried(HfApi().whoami)['name']}/{repo}"


class _Target:
    """The repository that is published to."""

    def __init__(self, api: Any, repo: str, kind: str) -> None:
        self._api, self._repo, self._kind = api, repo, kind

    def prepare(self, files: Mapping[str, Path], options: PublishOptions) -> bool:
        """Create the repository, or see that the one there can take ``files``. Returns whether it is private."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = self._tried(lambda: self._api.repo_info(self._repo, repo_type=self._kind))
        except RepositoryNotFoundError:
            if options.create_pr:
                raise UsageError(
                    f"there is no {self._repo} to open a pull request in", hint="leave out --pr to create it"
                ) from None
            # A repeated call that finds its own repository is no conflict.
            self._tried(lambda: self._api.create_repo(self._repo, repo_type=self._kind, private=True, exist_ok=True))
            say(f"created {self._repo}, private")
            return True
        if not info.private and not options.public:
            raise UsageError(f"{self._repo} is public", hint="add --public to publish there, or name another repository")
        if not options.create_pr and not options.overwrite:
            other = [
                entry.path
                for entry in self._entries(info.sha)
                if entry.path not in files or not is_content(files[entry.path], entry)
            ]
            if other:
                raise UsageError(
                    f"{self._repo} holds other content ({_some(other)})",
                    hint="name another repository, or add --overwrite: its history keeps what is there",
                )
        return bool(info.private)

    def upload(self, files: Mapping[str, Path], message: str, options: PublishOptions) -> tuple[str, str]:
        """Upload what is missing and commit it. Returns the commit, and the page where it shows."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        # What `upload_folder` does without Xet. With Xet it may commit in parts, and divides a commit that fails: between
        # two of them the repository would hold half of a model, or new weights among those they take the place of.
        # One commit is all or nothing, and what was uploaded for it need not be uploaded again.
        operations: list[Any] = [CommitOperationAdd(name, path) for name, path in files.items()]
        if options.overwrite and not options.create_pr:
            operations += [CommitOperationDelete(entry.path) for entry in self._entries("main") if entry.path not in files]
        done = self._tried(
            lambda: self._api.create_commit(
                self._repo,
                operations,
                repo_type=self._kind,
                commit_message=message,
                create_pr=options.create_pr,
            ),
            safe=not options.create_pr,
        )
        page = f"{self._api.endpoint}/{'datasets/' if self._kind == 'dataset' else ''}{self._repo}"
        return done.oid, done.pr_url or page

    def check(self, files: Mapping[str, Path], commit: str, *, alone: bool) -> None:
        """Read the commit's file list back. Raises `CheckError` where it is not ``files``."""
        there = {entry.path: entry for entry in self._entries(commit)}
        wrong = [name for name, path in files.items() if name not in there or not is_content(path, there[name])]
        more = sorted(there.keys() - files.keys()) if alone else []
        if wrong or more:
            raise CheckError(
                f"{self._repo} does not hold what was uploaded ({_some(wrong or more)} differs)",
                hint="run the same command again with --overwrite, or name another repository",
            )

    def _entries(self, revision: str) -> list[Any]:
        return self._tried(
            lambda: [
                entry
                for entry in self._api.list_repo_tree(self._repo, repo_type=self._kind, revision=revision, recursive=True)
                if hasattr(entry, "blob_id") and entry.path not in KEPT
            ]
        )

    def _tried(self, call: Callable[[], Any], *, safe: bool = True) -> Any:
        return retried(call, safe=safe)


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
