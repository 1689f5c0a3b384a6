"""MODEL, as users write it, to a directory of safetensors."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from chanfmt.base.errors import ChanfmtError, ModelError, UsageError
from chanfmt.base.narrate import say
from chanfmt.hub.fetch import fetch_snapshot

_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "*.md", "LICENSE*"]
TEMPLATE_DIRECTORY = "additional_chat_templates"
"""The one directory below a model's that belongs to it: transformers keeps a tokenizer's named chat templates there."""
# Some repositories carry the same weights again, in their makers' own layout, below or beside. Patterns cannot say
# "every directory but one"; these say it letter by letter.
_UNWANTED = ["consolidated*", *(f"{TEMPLATE_DIRECTORY[:at]}[!{letter}]*/*" for at, letter in enumerate(TEMPLATE_DIRECTORY))]
_PATIENCE = 5.0
"""Seconds to wait for an answer that is good to have and not needed."""


class Named(Protocol):
    """What atlases and plans say alike of a model: `chanfmt.format.records.ModelRecord`, `surgery.planning.plan.PlannedModel`."""

    @property
    def id(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model's files lie.

    Attributes:
        directory: Local directory with config, weights and tokenizer.
        id: Hub id, or the name of the directory or GGUF file.
        revision: Commit on the Hub, empty elsewhere.
        source: ``hub``, ``local`` or ``gguf``.
    """

    directory: Path
    id: str
    revision: str
    source: str


def resolve_model(model: str, *, revision: str | None = None) -> ResolvedModel:
    """Find ``model``: a local directory, a ``.gguf`` file, or a Hub id (downloaded to the Hub cache).

    Raises:
        ModelError: There is no such model, or it cannot be had.
    """
    path = Path(os.path.expanduser(model))
    local = path.suffix == ".gguf" or _exists(path)
    if local and revision is not None:
        raise UsageError(f"--revision {revision} names a commit on the Hub, and {model} is a local model")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"the GGUF file {model} does not exist")
        from chanfmt.models.gguf import dequantized_directory

        return ResolvedModel(dequantized_directory(path), path.name, "", "gguf")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"the directory {model} holds no config.json, so it is not a transformers model")
        return ResolvedModel(path, path.resolve().name, "", "local")
    if local:
        raise ModelError(f"{model} is a file; a model is a directory, a .gguf file or a Hub id")
    return _from_hub(model, revision)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise ModelError(f"{path} cannot be opened: {error.strerror}") from None


def own_revision(model: str, record: Named) -> str | None:
    """The commit that ``record`` was measured at, where ``model`` is what the record calls its model on the Hub."""
    same = record.source == "hub" and model == record.id and not Path(model).exists()
    return (record.revision or None) if same else None


def main_commit(model: ResolvedModel) -> str:
    """Commit that the main branch of a model from the Hub is at; empty where the Hub does not say so at once."""
    if model.source != "hub":
        return ""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().model_info(model.id, timeout=_PATIENCE).sha or ""
    except Exception:  # Offline, gone, not to be seen: whatever it is, the model is here already.
        return ""


def _from_hub(model: str, revision: str | None) -> ResolvedModel:
    try:
        directory = fetch_snapshot(model, revision, wanted=_WANTED, unwanted=_UNWANTED, note=say, progress=sys.stderr.isatty())
    except ChanfmtError as error:
        raise ModelError(f"there is no directory {model!r}; {error.message}", hint=error.hint) from None
    # snapshots/<commit>/ is the Hub cache's documented layout.
    return ResolvedModel(directory, model, directory.name, "hub")
