"""The directories of a sentence-transformers model: its ``modules.json`` names one for each module that has files."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from chanfmt.base.errors import ModelError
from chanfmt.base.inputs import file_size
from chanfmt.base.parsed import parse_unique

MODULES_FILE = "modules.json"
"""The list of the modules that follow each other, such as the transformer, a pooling and a dense layer."""
_MAX_BYTES = 1 << 20
_OWN_CODE = "sentence_transformers."


def module_directories(directory: Path) -> list[str]:
    """The directories below ``directory`` that its ``modules.json`` names, with slashes; empty if there is no such file.

    Raises:
        ModelError: The file is damaged, or names a path that leads out of ``directory``.
    """
    found = [path for path, _ in _modules(directory) if path not in ("", ".", "./")]
    for path in found:
        parts = PurePosixPath(path).parts
        if (
            path.startswith(("/", "~"))
            or ".." in parts
            or "\\" in path
            or ":" in path
            or any(part.startswith(".") for part in parts)
        ):
            raise ModelError(
                f"{MODULES_FILE} of {directory} names {path!r}, which is not a directory below the model's own",
                hint=f"correct the path in {MODULES_FILE}",
            )
    return list(dict.fromkeys(PurePosixPath(path).as_posix() for path in found))


def foreign_modules(directory: Path) -> list[str]:
    """Classes in ``modules.json`` that are not part of sentence-transformers, and so need code from the repository.

    Raises:
        ModelError: The file is damaged.
    """
    return sorted({kind for _, kind in _modules(directory) if not kind.startswith(_OWN_CODE)})


def _modules(directory: Path) -> list[tuple[str, str]]:
    """Path and class of every module."""
    file = directory / MODULES_FILE
    if not file.is_file():
        return []
    try:
        if file_size(file) > _MAX_BYTES:
            raise ModelError(f"{file} is larger than {_MAX_BYTES >> 20} MB")
        modules = parse_unique(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{file} is not a list of modules")
    found = [(module.get("path", ""), module.get("type", "")) for module in modules]
    for path, kind in found:
        if not isinstance(path, str) or not isinstance(kind, str) or re.search(r"[\x00-\x1f]", path + kind):
            raise ModelError(f"{file} has a module whose path or type is not a text")
    return found
