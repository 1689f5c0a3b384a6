"""Atlases and models by name: something on this machine, or on the Hub. The Hub is asked only for what is named so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from chanfmt.base.errors import ChanfmtError, ModelError, UsageError
from chanfmt.format.reader import Atlas
from chanfmt.hub.names import is_address, parse_address
from chanfmt.models.source import TEMPLATE_DIRECTORY, ModelSource, is_local, local_source

SUFFIX = ".h5"
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "*.md", "LICENSE*"]
# Some repositories carry the same weights again, in their makers' own layout, below or beside. Patterns cannot say
# "every directory but one"; these say it letter by letter.
_UNWANTED = ["consolidated*", *(f"{TEMPLATE_DIRECTORY[:at]}[!{letter}]*/*" for at, letter in enumerate(TEMPLATE_DIRECTORY))]
_PATIENCE = 5.0
"""Seconds to wait for an answer that is good to have and not needed."""


class Located(NamedTuple):
    """Where an atlas lies.

    Attributes:
        path: The file.
        source: Which file of which commit on the Hub it is; empty if it was named by its path.
    """

    path: Path
    source: str


def locate_atlas(name: str | os.PathLike[str]) -> Located:
    """The file called ``name``. A file on the Hub is fetched to the Hub cache.

    Raises:
        UsageError: The address names nothing, or several files.
        HubError: The file cannot be had.
        CheckError: The file arrived damaged.
    """
    if isinstance(name, Path) or not is_address(os.fspath(name)):
        return Located(Path(name), "")
    from chanfmt.hub.fetch import fetch

    fetched = fetch(parse_address(os.fspath(name)), suffix=SUFFIX)
    return Located(fetched.path, str(fetched.source))


def open_atlas(name: str | os.PathLike[str], *, verify: bool = False, contained: bool = False) -> Atlas:
    """Open the atlas called ``name``, a path or ``hf://datasets/USER/NAME[@REVISION]/FILE``.

    Raises:
        AtlasError, UsageError, HubError, CheckError: As `Atlas.open` and `locate_atlas`.
    """
    path, source = locate_atlas(name)
    atlas = Atlas.open(path, verify=verify, contained=contained)
    atlas.hub_source = source
    return atlas


def locate_model(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelSource:
    """Find ``model``: a local directory, a ``.gguf`` file, or a Hub id, which is downloaded to the Hub cache.

    Raises:
        ModelError: There is no such model, or it cannot be had.
        UsageError: ``revision`` for a local model.
    """
    if revision is not None and is_local(Path(os.path.expanduser(model))):
        raise UsageError(f"--revision {revision} names a commit on the Hub, and {model} is a local model")
    here = local_source(model, trust_remote_code=trust_remote_code)
    if here is not None:
        return here
    from chanfmt.hub.fetch import fetch_snapshot

    try:
        directory = fetch_snapshot(model, revision, wanted=_WANTED, unwanted=_UNWANTED)
    except ChanfmtError as error:
        raise ModelError(f"there is no directory {model!r}; {error.message}", hint=error.hint) from None
    # snapshots/<commit>/ is the Hub cache's documented layout.
    return ModelSource(directory, model, directory.name, "hub", trust_remote_code=trust_remote_code)


def main_commit(model: ModelSource) -> str:
    """Commit that the main branch of a model from the Hub is at; empty if the Hub does not say so at once."""
    if model.source != "hub":
        return ""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().model_info(model.id, timeout=_PATIENCE).sha or ""
    except Exception:  # Offline, gone, not to be seen: whatever it is, the model is here already.
        return ""
