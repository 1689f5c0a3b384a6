"""The files that travel with a model's weights: tokenizer, templates, licence, and the modules of sentence-transformers.

Neither pickles nor code travel. A file that names code of the repository (``auto_map``) would then name files that are not
there, so these fields go: the stock class loads the result.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chanfmt.base.command_line import names_directory
from chanfmt.base.errors import first_line
from chanfmt.base.narrate import say, warn
from chanfmt.models.quiet import quiet_transformers
from chanfmt.models.safetensors import PICKLED_SUFFIXES
from chanfmt.models.sentence_transformers import MODULES_FILE, foreign_modules, module_directories
from chanfmt.models.source import TEMPLATE_DIRECTORY
from surgery.result.names import CARD_FILE, EVALUATION_FILE, PICTURE_FILE, REPORT_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_MAX_CARRIED = 128 << 20
_NEVER = (
    *PICKLED_SUFFIXES,
    ".gguf",
    ".ggml",
    ".onnx",
    ".onnx_data",
    ".h5",
    ".hdf5",
    ".msgpack",
    ".ot",
    ".tflite",
    ".mlmodel",
    ".pb",
    ".npz",
    ".npy",
    ".py",
)
_WEIGHTS = (".safetensors", ".index.json")
_NOT_CARRIED = ("config.json", CARD_FILE, "adapter_config.json", REPORT_FILE, PICTURE_FILE, EVALUATION_FILE)
_PATH_FIELDS = ("_name_or_path", "name_or_path")
_CODE_FIELDS = ("auto_map", "custom_pipelines")
"""Fields that name code files of the repository."""


@dataclass(frozen=True)
class Carried:
    """The files of a model that travel with its weights.

    Attributes:
        directory: The model's directory.
        files: Files below ``directory``, sorted.
    """

    directory: Path
    files: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)

    def copy(self, target: Path) -> None:
        """Copy the files into the directory ``target``, which exists."""
        named_code = False
        for path in self.files:
            place = target / path.relative_to(self.directory)
            place.parent.mkdir(parents=True, exist_ok=True)
            named_code |= _copy(path, place)
        if named_code:
            _check_tokenizer(target)


def find_carried(directory: Path) -> Carried:
    """The files that travel: every small, visible file that holds neither weights nor code, and what ``modules.json`` names.

    A module's directory travels with all that is in it, its weights included: modules such as Dense work on hidden states,
    whose size does not change.

    Raises:
        ModelError: ``modules.json`` is damaged, or names a path that leads out of ``directory``.
    """
    modules = module_directories(directory)
    for kind in foreign_modules(directory):
        warn(f"{MODULES_FILE} names the class {kind}, whose code does not travel: sentence-transformers will not load the result")
    return Carried(directory, tuple(_files(directory, modules)))


def _files(directory: Path, modules: list[str]) -> Iterator[Path]:
    home = directory.resolve()
    inside = [*directory.glob(f"{TEMPLATE_DIRECTORY}/*.jinja")]
    for name in modules:
        inside += (directory / name).rglob("*")
    # In the Hub cache, a snapshot's files are links into the repository's blobs.
    blobs = home.parent.parent / "blobs"
    for path in sorted({*directory.iterdir(), *inside}):
        parts = path.relative_to(directory).parts
        name = "/".join(parts)
        of_module = len(parts) > 1 and parts[0] != TEMPLATE_DIRECTORY
        if not path.is_file() or any(part.startswith(".") for part in parts) or name in _NOT_CARRIED:
            continue
        if name.endswith(_NEVER) or (name.endswith(_WEIGHTS) and not of_module):
            if of_module and name.endswith(PICKLED_SUFFIXES) and not list(path.parent.glob("*.safetensors")):
                warn(f"{name} is not carried over: reading pickled weights can run code. Save the module as safetensors first")
            continue
        real = path.resolve()
        if real.parent != home.joinpath(*parts[:-1]) and real.parent != blobs:
            say(f"{name} is not carried over: it is a link out of the model's directory")
        elif not of_module and path.stat().st_size > _MAX_CARRIED:
            say(f"{name} is not carried over: it is larger than {_MAX_CARRIED >> 20} MB")
        else:
            yield path


def clean_config(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` without the directory that the model was once loaded from, and without the names of code files."""
    return {
        name: clean_config(item) if isinstance(item, dict) else item
        for name, item in config.items()
        if name not in _CODE_FIELDS and not (name in _PATH_FIELDS and isinstance(item, str) and names_directory(item))
    }


def write_json(value: dict[str, Any], path: Path, *, allow_nan: bool = False) -> None:
    """Write ``value`` for people to read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n", encoding="utf-8")


def _copy(path: Path, target: Path) -> bool:
    """Copy a file. A ``*_config.json`` is cleaned as `clean_config` does. Returns whether it named code files."""
    if path.name.endswith("_config.json"):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            value = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(value, dict) and (clean := clean_config(value)) != value:
                write_json(clean, target, allow_nan=True)
                return "auto_map" in value
    shutil.copyfile(path, target)
    return False


def _check_tokenizer(directory: Path) -> None:
    """Warn if stock code cannot load the tokenizer of ``directory``, whose configs named code files."""
    import transformers

    if not (directory / "tokenizer_config.json").is_file():
        return
    try:
        with quiet_transformers():
            transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    # A tokenizer is free-form, so transformers may raise anything over it.
    except Exception as error:
        warn(
            f"the tokenizer needs code of the model's repository, which does not travel: use the model's own tokenizer ({first_line(error)})"
        )
