"""Names on the Hub, as users write them. No network."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from chanfmt.base.errors import UsageError
from chanfmt.base.hub_ids import is_hub_id

SCHEME = "hf://"
KINDS = {"datasets": "dataset", "models": "model"}
_REVISION = r"refs/(?:pr|convert)/[^/@]+|[^/@]+"
_ADDRESS = re.compile(rf"(?:(?P<kind>datasets|models)/)?(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>{_REVISION}))?(?:/(?P<file>.+))?")


@dataclass(frozen=True)
class HubFile:
    """A file on the Hub.

    Attributes:
        repo: ``USER/NAME``.
        kind: ``dataset`` or ``model``.
        revision: Branch, tag, pull request or commit; None is the main branch.
        file: Path in the repository; None for the only file of its kind there.
    """

    repo: str
    kind: str = "dataset"
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"{SCHEME}{self.kind}s/{self.repo}{revision}" + (f"/{self.file}" if self.file else "")


def is_address(name: str) -> bool:
    """Whether ``name`` is the address of a file on the Hub, and not a path."""
    return name.startswith(SCHEME)


def parse_address(address: str) -> HubFile:
    """Parse ``hf://[datasets/|models/]USER/NAME[@REVISION][/FILE]``, by default the address of a data set.

    Raises:
        UsageError: ``address`` does not have that form.
    """
    match = _ADDRESS.fullmatch(address.removeprefix(SCHEME))
    if match is None:
        raise UsageError(
            f"{address!r} is not the address of a file on the Hub",
            hint="write hf://datasets/USER/NAME/FILE or hf://USER/NAME/FILE",
        )
    check_repo(match["repo"])
    file = match["file"]
    if file is not None and any(part in ("", ".", "..") for part in file.split("/")):
        raise UsageError(f"{file!r} is not a path in a repository", hint="write it from the repository's root, without '..'")
    revision = None if match["revision"] is None else unquote(match["revision"])
    return HubFile(match["repo"], KINDS[match["kind"] or "datasets"], revision, file)


def check_repo(repo: str) -> None:
    """Raise `UsageError` if ``repo`` cannot be the name of a repository, ``USER/NAME`` or ``NAME``."""
    if not is_hub_id(repo):
        raise UsageError(
            f"{repo!r} cannot be the name of a repository",
            hint="write USER/NAME: letters, digits, '-', '_', '.', at most 96, without '--' and '..', no '-' or '.' at an end",
        )
