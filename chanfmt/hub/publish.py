"""Publish a folder as a repository on the Hub: create, upload, read back, and only then show it to others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import CheckError, UsageError
from chanfmt.base.narrate import say
from chanfmt.hub.digests import is_content
from chanfmt.hub.failures import hub_errors, no_token, quiet_client, retried, stored_token
from chanfmt.hub.names import check_repo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

KEPT = (".gitattributes",)
"""Files that the Hub itself puts into a repository."""


@dataclass(frozen=True)
class VisibilityOptions:
    """Who sees the repository, and whether its owner is asked first."""

    public: bool = field(default=False, metadata={"help": "make the repository public"})
    create_pr: bool = field(
        default=False,
        metadata={
            "help": "open a pull request in an existing repository instead of committing to it",
            "flag": "--pr",
        },
    )


@dataclass(frozen=True)
class PublishOptions(VisibilityOptions):
    """How the repository is published."""

    overwrite: bool = field(
        default=False,
        metadata={
            "help": "replace what the repository holds; its history keeps the old content",
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
    """Make a repository hold the files of ``folder``, and check that it does.

    Files that an earlier call uploaded are not uploaded again. A new repository is private until the check has passed.

    Args:
        repo: ``USER/NAME``, or ``NAME`` for a repository of the logged-in user.
        kind: ``model`` or ``dataset``.
        message: Message of the commit, or title of the pull request.
        names: Paths, relative to ``folder``, of the files to publish; None for all.

    Raises:
        UsageError: ``repo`` cannot be a name, or the repository cannot be used as asked.
        HubError: The Hub refused or could not be reached. ``folder`` is unchanged.
        CheckError: The Hub holds other files than ``folder`` after the upload.
    """
    from huggingface_hub import HfApi

    check_repo(repo)
    files = _files(folder) if names is None else {name: folder / name for name in sorted(names)}
    check_login()
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


def check_login() -> None:
    """Raise `HubError` if there is no token. The Hub is not asked whether it accepts the token."""
    if stored_token() is None:
        raise no_token()


def _files(folder: Path) -> dict[str, Path]:
    """Path in the repository to file, for every file except those that git and the Hub's client keep for themselves."""
    from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: found[name] for name in filter_repo_objects(found, ignore_patterns=DEFAULT_IGNORE_PATTERNS)}


def full_name(repo: str) -> str:
    """``repo`` as ``USER/NAME``: a bare name belongs to the logged-in user. Raises `HubError`."""
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
        """Create the repository, or check that the existing one can take ``files``. Returns whether it is private."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = self._tried(lambda: self._api.repo_info(self._repo, repo_type=self._kind))
        except RepositoryNotFoundError:
            if options.create_pr:
                raise UsageError(
                    f"{self._repo} does not exist, so no pull request can be opened in it", hint="leave out --pr to create it"
                ) from None
            # A repeated request may find the repository that the first one created.
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
                    hint="name another repository, or add --overwrite: the history keeps the old content",
                )
        return bool(info.private)

    def upload(self, files: Mapping[str, Path], message: str, options: PublishOptions) -> tuple[str, str]:
        """Upload what is missing and commit it. Returns the commit, and the page that shows it."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        # `upload_folder` does the same without Xet. With Xet it may commit in parts, and it divides a commit that fails.
        # Between two such commits the repository would hold half of a model, or a mixture of old and new weights.
        # One commit is all or nothing, and files that were uploaded for it are not uploaded again.
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
        """Read the commit's file list back. Raises `CheckError` if it differs from ``files``."""
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
