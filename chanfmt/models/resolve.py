"""MODEL, as users write it, to a directory of safetensors."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from chanfmt.errors import ModelError, UsageError

_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "*.md", "LICENSE*"]
TEMPLATE_DIRECTORY = "additional_chat_templates"
"""The one directory below a model's that belongs to it: transformers keeps a tokenizer's named chat templates there."""
# Some repositories carry the same weights again, in their makers' own layout, below or beside. Patterns cannot say
# "every directory but one"; these say it letter by letter.
_UNWANTED = ["consolidated*", *(f"{TEMPLATE_DIRECTORY[:at]}[!{letter}]*/*" for at, letter in enumerate(TEMPLATE_DIRECTORY))]


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


def _from_hub(model: str, revision: str | None) -> ResolvedModel:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        directory = Path(huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        ))
    except errors.HFValidationError:
        raise ModelError(f"{model!r} is neither a directory nor a Hub id") from None
    except errors.GatedRepoError:
        raise ModelError(
            f"{model} is gated", hint=f"accept its terms at https://huggingface.co/{model} and run: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"there is no directory {model!r} and no model of that name on the Hub",
            hint="check the spelling; for a private model run: hf auth login",
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{model} has no revision {revision!r}") from None
    # Offline, no network, a bad endpoint, a full disk: the client and its transport raise many kinds.
    except Exception as error:
        raise ModelError(
            f"there is no directory {model!r}, and the Hub could not be asked for it ({type(error).__name__})",
            hint="check the path, or the network; a cached model works offline",
        ) from None
    # snapshots/<commit>/ is the Hub cache's documented layout.
    return ResolvedModel(directory, model, directory.name, "hub")
