"""Options from Python values: a list in Python is text separated by commas on the command line."""

from __future__ import annotations

import typing
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

Options = TypeVar("Options")


def spelled(options: type[Options], values: Mapping[str, Any]) -> Options:
    """Fill the dataclass ``options`` with ``values``.

    A field of type ``str`` takes a number, and a sequence or a numpy array, whose items are joined by commas. A field of type ``tuple``
    takes a single text too.

    >>> from surgery.experiments.sweep_plan import SweepOptions
    >>> spelled(SweepOptions, {"methods": ["wanda", "taylor"], "sparsity": 0.5}).methods
    'wanda,taylor'

    Raises:
        TypeError: ``options`` has no such field.
    """
    hints = typing.get_type_hints(options)
    return options(**{name: _spelled(value, hints.get(name)) for name, value in values.items()})


def _spelled(value: Any, hint: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if hint in (str, str | None) and value is not None:
        return ",".join(map(str, value)) if isinstance(value, list | tuple | range | set | frozenset) else str(value)
    if typing.get_origin(hint) is tuple:
        return tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)
    return value
