"""What the test Hub knows: users, repositories with their commits, and the content behind them. No HTTP."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

LFS_SUFFIXES = (".h5", ".safetensors", ".bin", ".npz", ".gguf", ".parquet", ".png")
LFS_BYTES = 10 << 20
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class Refused(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: What the Hub says.
        code: ``X-Error-Code``, if the Hub sends one.
    """

    def __init__(self, status: int, message: str, code: str = "", **body: object) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass(frozen=True)
class User:
    """Who a token stands for.

    Attributes:
        role: What the token may do: ``read`` or ``write``.
        orgs: Organisation to the user's role in it.
    """

    name: str
    role: str = "write"
    orgs: dict[str, str] = field(default_factory=dict)

    def may_write(self, namespace: str) -> bool:
        return self.role == "write" and (namespace == self.name or self.orgs.get(namespace) in ("write", "admin"))

    def sees_private(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs


@dataclass(frozen=True)
class File:
    """A file of a commit: in git itself, or as a pointer to large file storage."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """Git's id of the file, or of its pointer if the file is in large file storage."""
        text = self.content
        if self.lfs:
            text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(text)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    id: str
    parent: str
    title: str
    author: str
    date: str
    files: dict[str, File]


@dataclass
class Repo:
    """A repository.

    Attributes:
        kind: ``model`` or ``dataset``.
        gated: Files are for those in ``granted`` only.
        refs: Branch, tag or pull request to commit id.
        pulls: Titles of the pull requests, number 1 first.
        objects: Large files that were uploaded, whether a commit names them or not.
    """

    id: str
    kind: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    pulls: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    @property
    def head(self) -> Commit:
        return self.commits[self.refs["main"]]

    def at(self, revision: str) -> Commit:
        """The commit that a branch, tag, pull request or commit id names."""
        commit = self.commits.get(self.refs.get(revision, revision))
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def commit(self, files: dict[str, File], title: str, author: str, revision: str = "main") -> Commit:
        """Make ``files`` the state of ``revision``."""
        parent = self.refs.get(revision, "")
        seed = [parent, title, str(len(self.commits)), *(f"{path} {files[path].blob_id}" for path in sorted(files))]
        new = Commit(
            hashlib.sha1("\n".join([self.kind, self.id, *seed]).encode()).hexdigest(),
            parent,
            title,
            author,
            datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
            dict(files),
        )
        self.commits[new.id] = new
        self.refs[revision] = new.id
        return new

    def open_pull(self, title: str) -> int:
        """Open a pull request that starts at ``main``. Returns its number."""
        self.pulls.append(title)
        self.refs[f"refs/pr/{len(self.pulls)}"] = self.refs["main"]
        return len(self.pulls)


class Store:
    """All users and repositories.

    Attributes:
        uploaded: Digest of a large file, or of a xorb, to how often its content arrived whole.
        received: Digest of a large file to the bytes that arrived for it, those of broken uploads among them.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users: dict[str, User] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.uploaded: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.xorbs: dict[str, bytes] = {}
        self._parts: dict[str, dict[int, bytes]] = {}
        self._grants: dict[str, Repo] = {}

    def user(self, authorization: str | None) -> User | None:
        """The user who sends this header; nobody if there is no header."""
        if not authorization:
            return None
        user = self.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def create(self, user: User | None, namespace: str, name: str, kind: str, *, private: bool) -> Repo:
        """A new repository with its first commit, as `create_repo` makes it."""
        if user is None:
            raise Refused(401, "Invalid username or password.")
        repo = Repo(f"{namespace}/{name}", kind, private=private)
        if not user.may_write(namespace):
            raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
        if (kind, repo.id) in self.repos:
            raise Refused(409, f"You already created this {kind} repo", url=self.page(repo))
        repo.commit({".gitattributes": File(GITATTRIBUTES, lfs=False)}, "initial commit", user.name)
        self.repos[kind, repo.id] = repo
        return repo

    def repo(self, user: User | None, kind: str, repo_id: str) -> Repo:
        """The repository, for someone who may know that it is there."""
        repo = self.repos.get((kind, repo_id))
        if repo is None or (repo.private and not (user and user.sees_private(repo.namespace))):
            if user is None:
                raise Refused(401, "Invalid username or password.", "RepoNotFound")
            raise Refused(404, "Repository not found", "RepoNotFound")
        return repo

    def check_files(self, user: User | None, repo: Repo) -> None:
        """Whether ``user`` may read the files of a gated ``repo``."""
        if not repo.gated or (user and (user.name in repo.granted or user.sees_private(repo.namespace))):
            return
        name = "model" if repo.kind == "model" else "dataset"
        if user is None:
            raise Refused(
                401,
                f"Access to {name} {repo.id} is restricted. You must have access to it and be authenticated "
                "to access it. Please log in.",
                "GatedRepo",
            )
        raise Refused(403, f"Access to {name} {repo.id} is restricted and you are not in the authorized list.", "GatedRepo")

    def check_write(self, user: User | None, repo: Repo) -> User:
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if not user.may_write(repo.namespace):
            raise Refused(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return user

    def grant(self, user: User, repo: Repo) -> str:
        """A token with which ``user`` may store content for ``repo``."""
        token = f"xet-{len(self._grants)}"
        self.users[token] = user
        self._grants[token] = repo
        return token

    def granted(self, authorization: str) -> Repo:
        """The repository that a token of `grant` is for."""
        repo = self._grants.get(authorization.removeprefix("Bearer "))
        if repo is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return repo

    def add_part(self, key: str, number: int, content: bytes) -> None:
        self._parts.setdefault(key, {})[number] = content

    def complete(self, key: str) -> bytes:
        parts = self._parts.pop(key, {})
        return b"".join(parts[number] for number in sorted(parts))

    def receive(self, repo: Repo, oid: str, content: bytes) -> None:
        """Keep an upload that arrived whole."""
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "The SHA-256 of the content is not the one that was announced")
        self.uploaded[oid] += 1
        repo.objects[oid] = content

    @staticmethod
    def page(repo: Repo) -> str:
        """Where people find the repository, without the host."""
        return ("" if repo.kind == "model" else f"{repo.kind}s/") + repo.id


def stored(path: str, content: bytes) -> File:
    """``content`` as the Hub keeps it under ``path``."""
    return File(content, lfs=bool(content) and (path.endswith(LFS_SUFFIXES) or len(content) >= LFS_BYTES))
