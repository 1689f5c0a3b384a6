"""JSON texts inside an atlas, parsed into values of the types that they should have. What a file says is untrusted."""

from __future__ import annotations

import functools
import json
from typing import Any, TypeVar, cast

from chanfmt.base.errors import AtlasError, first_line

Value = TypeVar("Value")


def parsed(text: str, kind: type[Value], where: str) -> Value:
    """Parse ``text`` as JSON of exactly the type ``kind``; unknown keys of a dataclass are passed over.

    The container limits the length of a text, msgspec limits its depth and the size of its numbers.

    Args:
        where: Path of the text in the file, for the message.

    Raises:
        AtlasError: Not JSON, or JSON of another type (E110).
    """
    try:
        return cast("Value", _decoder(cast("Any", kind)).decode(text))
    # msgspec's own errors are ValueErrors, and so is a text that is not Unicode.
    except (ValueError, RecursionError) as error:
        raise AtlasError(f"{where} is not valid: {first_line(error)}", code="E110", where=where) from None


def object_lines(text: str, where: str) -> tuple[dict[str, Any], ...]:
    """Parse one JSON object per line; empty lines are passed over. Raises `AtlasError` as `parsed` does."""
    return tuple(parsed(line, dict[str, Any], where) for line in text.split("\n") if line)


def configuration(text: str) -> dict[str, Any] | None:
    """A model's config.json as a JSON object; None if it is anything else.

    Python's own parser is used, because the configurations of some models hold ``Infinity``.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@functools.lru_cache(maxsize=16)
def _decoder(kind: Any) -> Any:
    # Most commands that read an atlas ask for one of these texts only, and some for none.
    import msgspec

    return msgspec.json.Decoder(kind)
