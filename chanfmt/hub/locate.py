"""Find atlases and models by name, on this machine or on the Hub. No other module asks the Hub for something to read."""

from __future__ import annotations

import contextlib
import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from chanfmt.base.errors import ChanfmtError, ModelError, UsageError
from chanfmt.base.hub_ids import is_hub_id
from chanfmt.base.inputs import input_path
from chanfmt.format.reader import Atlas
from chanfmt.hub.names import is_address, parse_address
from chanfmt.models.gguf_cache import MODEL_DIRECTORY, cache_directory, entries
from chanfmt.models.sentence_transformers import module_directories
from chanfmt.models.source import TEMPLATE_DIRECTORY, TOKENIZER_FILE, ModelSource, check_local, is_local, local_source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chanfmt.format.records import ModelRecord

SUFFIX = ".h5"
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "*.md", "LICENSE*"]
# Some repositories hold the same weights again in another layout, in other files or directories. A pattern cannot exclude
# every directory but one, so one pattern for each letter of its name does.
_UNWANTED = ["consolidated*", *(f"{TEMPLATE_DIRECTORY[:at]}[!{letter}]*/*" for at, letter in enumerate(TEMPLATE_DIRECTORY))]
_OF_MODULE = ["*.safetensors", "*.json", "*.txt", "*.model"]
_PATIENCE = 5.0
"""Seconds to wait for an answer that is useful but not needed."""


class Located(NamedTuple):
    """An atlas on this machine.

    Attributes:
        path: The file.
        source: Address of the file on the Hub, with the commit; empty if the atlas was named by its path.
    """

    path: Path
    source: str


def locate_atlas(name: str | os.PathLike[str]) -> Located:
    """Find the atlas called ``name``. An atlas on the Hub is fetched to the Hub cache.

    Raises:
        UsageError: ``name`` is not a name, or the address does not name exactly one file.
        HubError: The file cannot be fetched.
        CheckError: The file arrived damaged.
    """
    if not isinstance(name, str | os.PathLike):
        raise UsageError(
            f"{type(name).__name__} is not an atlas", hint="pass an open atlas, a path, or hf://datasets/USER/NAME/FILE"
        )
    if isinstance(name, Path) or not is_address(os.fspath(name)):
        return Located(input_path(name), "")
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


@contextlib.contextmanager
def opened(atlas: Atlas | str | os.PathLike[str], *, verify: bool = False) -> Iterator[Atlas]:
    """Have ``atlas`` open in the body. An atlas that was given by name is closed afterwards; an open atlas stays open.

    Args:
        atlas: An open atlas, or a name as `open_atlas` takes it, which is read in a process of its own first.
        verify: Whether to recompute the digests.

    Raises:
        AtlasError, UsageError, HubError, CheckError: As `open_atlas`.
    """
    if isinstance(atlas, Atlas):
        if verify:
            atlas.verify()
        yield atlas
    else:
        with open_atlas(atlas, verify=verify, contained=True) as found:
            yield found


def model_name(model: str | os.PathLike[str]) -> str:
    """The name that ``model`` is. Raises `UsageError` if it is something else, such as a loaded model."""
    if not isinstance(model, str | os.PathLike):
        raise UsageError(f"{type(model).__name__} is not the name of a model", hint="pass a Hub id, a directory or a .gguf file")
    return os.fspath(model)


def check_model(model: str, *, revision: str | None = None) -> None:
    """Raise the errors of `locate_model` that need neither the network nor a weight.

    Raises:
        ModelError: This machine has a file of that name that is not a model, or the name cannot be that of a model.
        UsageError: ``revision`` is given for a local model.
    """
    if revision is not None and is_local(input_path(model)):
        raise UsageError(f"--revision is for models on the Hub, and {model} is a local model", hint="leave out --revision")
    if "://" in model:
        parts = model.partition("://")[2].split("/")[not is_address(model) :][:2]
        raise UsageError(f"{model} is an address, not the id of a model", hint=f"write: {'/'.join(parts)}")
    if check_local(model):
        return
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        raise ModelError(
            f"{model!r} is neither on this machine nor the name of a model on the Hub",
            hint="write the id of a model as USER/NAME",
        ) from None


def locate_model(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelSource:
    """Find ``model``: a local directory, a ``.gguf`` file, or a Hub id, which is downloaded to the Hub cache.

    Raises:
        ModelError: The model does not exist, or cannot be fetched.
        UsageError: ``revision`` is given for a local model.
    """
    check_model(model, revision=revision)
    here = local_source(model, trust_remote_code=trust_remote_code)
    if here is not None:
        return here
    try:
        return hub_model(model, revision=revision, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ModelError(f"{model!r} is not a local directory; {error.message}", hint=error.hint) from None


def hub_model(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelSource:
    """Find the model with the Hub id ``model``, which is downloaded to the Hub cache. No file of this machine is opened instead.

    Raises:
        ModelError: ``model`` is not a Hub id, does not exist, or cannot be fetched.
    """
    from chanfmt.hub.fetch import fetch_snapshot

    try:
        directory = fetch_snapshot(model, revision, wanted=_WANTED, unwanted=_UNWANTED)
        # sentence-transformers keeps each further module of a model in a directory of its own.
        modules = [f"{glob.escape(name)}/{pattern}" for name in module_directories(directory) for pattern in _OF_MODULE]
        if modules:
            fetch_snapshot(model, directory.name, wanted=modules, unwanted=[])
    except ChanfmtError as error:
        raise ModelError(error.message, hint=error.hint) from None
    # snapshots/<commit>/ is the Hub cache's documented layout.
    return ModelSource(directory, model, directory.name, "hub", trust_remote_code=trust_remote_code)


def locate_tokenizer(record: ModelRecord, model: str | None = None) -> Path | None:
    """The ``tokenizer.json`` of the model ``record`` if it is on this machine; nothing is downloaded or converted.

    It is looked for in the Hub cache, and among the checkpoints that were made of GGUF files.

    Args:
        model: What to look at instead: a local directory, a ``.gguf`` file, or a Hub id.

    Returns:
        None if it is not there.

    Raises:
        ModelError: ``model`` is neither on this machine nor a Hub id.
    """
    if model is not None:
        check_model(model)
        path = input_path(model)
        if is_local(path):
            return _converted(path.name) if path.suffix == ".gguf" else _file_in(path)
        return _cached_on_hub(model, None)
    # The name in an atlas is looked up, and never opened as a path.
    if record.source == "gguf":
        return _converted(record.id, record.fingerprint)
    return _cached_on_hub(record.id, record.revision or None) if record.source == "hub" and is_hub_id(record.id) else None


def _cached_on_hub(model: str, revision: str | None) -> Path | None:
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(model, TOKENIZER_FILE, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _converted(name: str, expected: str | None = None) -> Path | None:
    """The tokenizer of the checkpoint made of a GGUF file called ``name``, with the fingerprint ``expected`` if it is given."""
    for entry in entries():
        if entry.conversion is None or entry.conversion.file != name:
            continue
        directory = cache_directory() / entry.name / MODEL_DIRECTORY
        with contextlib.suppress(ModelError):
            if expected is None or ModelSource(directory).fingerprint == expected:
                return _file_in(directory)
    return None


def _file_in(directory: Path) -> Path | None:
    path = directory / TOKENIZER_FILE
    return path if path.is_file() else None


def main_commit(model: ModelSource) -> str:
    """Commit of the main branch of a model from the Hub; empty if the Hub does not answer at once."""
    if model.source != "hub":
        return ""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().model_info(model.id, timeout=_PATIENCE).sha or ""
    except Exception:  # Whatever the reason is, the model is already on this machine.
        return ""
