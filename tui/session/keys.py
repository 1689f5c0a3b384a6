"""The file in which a user gives other keys to the actions of the browser."""

from __future__ import annotations

import os
import tomllib
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import UsageError
from chanfmt.base.inputs import input_path
from chanfmt.base.text import one_line

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

VARIABLE = "ATLAS_TUI_KEYS"
"""Environment variable that names the file."""
FILE_NAME = "keys.toml"
MEND = f"mend the file; {VARIABLE}=/dev/null starts with the default keys"
Keys = dict[str, tuple[str, ...]]
"""Name of each action to its keys."""


def default_file() -> Path:
    """Where the file is if nothing names another: ``~/.config/chanfmt/keys.toml`` on Linux, or below ``XDG_CONFIG_HOME``."""
    import platformdirs

    return platformdirs.user_config_path("chanfmt", appauthor=False) / FILE_NAME


def keys_file(named: str | None) -> Path | None:
    """The file to read: ``named``, or the file that the environment names, or the default file; None if that does not exist."""
    named = named or os.environ.get(VARIABLE)
    if named:
        return input_path(named)
    path = default_file()
    return path if os.path.exists(path) else None


def read_keys(path: Path) -> Keys:
    """Read the file ``path``: lines such as ``mark = "m"`` or ``find = ["/", "ctrl+f"]``. The names are not checked yet.

    Raises:
        UsageError: The file cannot be read, is not TOML, or has a value that is neither a key nor a list of keys.
    """
    try:
        content = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise UsageError(f"the keys in {path} cannot be read: {error.strerror}", hint="choose another file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {one_line(str(error))}", hint=MEND) from None
    return {one_line(name): _keys(path, name, value) for name, value in _plain(content).items()}


def _plain(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """``content``, without the heading ``[keys]`` if that is all there is."""
    keys = content.get("keys")
    return keys if len(content) == 1 and isinstance(keys, dict) else content


def _keys(path: Path, name: str, value: object) -> tuple[str, ...]:
    keys = [value] if isinstance(value, str) else value
    if not isinstance(keys, list) or not keys or not all(isinstance(key, str) and key for key in keys):
        raise UsageError(
            f'{path}: {one_line(name)} must be a key, such as "m", or a list of keys, such as ["m", "ctrl+g"]', hint=MEND
        )
    return tuple(keys)
