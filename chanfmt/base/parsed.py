"""JSON of unknown origin, read into declared types by msgspec. Every error names the field that is wrong."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
_LONGEST = 200
"""Characters of a message that are shown: it may quote the document."""


def parse_json(text: str | bytes, kind: type[T]) -> T:
    """``text``, one JSON document, as a value of ``kind``. No type is converted to another, except integers to floats.

    Fields that ``kind`` does not declare are skipped, unless it is a `msgspec.Struct` that forbids them.

    Raises:
        ValueError: It is not JSON, a field is missing or has another type, a number is not finite, or an object holds a name
            twice. (Of two values, one program reads the first and another the last.)
    """
    try:
        found = msgspec.json.decode(text, type=kind)
        # msgspec takes the last value. The numbers have been read, and are not of interest here.
        json.loads(
            bytes(text) if isinstance(text, msgspec.Raw) else text,
            object_pairs_hook=no_duplicates,
            parse_int=len,
            parse_float=len,
        )
        return found
    except msgspec.ValidationError as error:
        raise ValueError(_named(str(error))) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"it is not valid JSON: {error}") from None


def check_type(value: Any, kind: type[T]) -> T:
    """``value``, as `json.loads` returns it, as a value of ``kind``.

    Raises:
        ValueError: As `parse_json`.
    """
    try:
        found = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ValueError(_named(str(error))) from None
    return found


def parse_unique(text: str) -> Any:
    """``text`` as `json.loads` returns it.

    Raises:
        ValueError: It is not JSON, or an object holds a name twice.
    """
    try:
        return json.loads(text, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of ``pairs``, as ``object_pairs_hook`` for untrusted JSON. Raises `ValueError` for a name that appears twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _named(message: str) -> str:
    """msgspec's ``Expected `int`, got `str` - at `$.layers[0].kept``` with the field in front."""
    found = re.fullmatch(r"(.*) - at `\$\.?(.*)`", message, re.DOTALL)
    where, what = (found[2], found[1]) if found else ("it", message)
    what = what.replace("`", "")[:_LONGEST]
    return f"{where} is not valid: {what[:1].lower()}{what[1:]}"
