"""Sizes that a model is asked to have: ``75%``, ``6B``, ``12GB``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from chanfmt.base.errors import UsageError

SHARE, PARAMETERS, BYTES = "share", "parameters", "bytes"
"""Kinds of a target."""
SYNTAX = "75% of its parameters, 6B or 100M parameters, 12GB or 300MB of weights"
"""The targets that can be written, for help texts."""
BYTES_OF = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
"""Bytes of a parameter in each dtype."""

_TARGET = re.compile(r"([0-9]+(?:[.][0-9]+)?|[.][0-9]+) ?(?:(%)|([KMBT])|([KMGT])(i?)B)", re.IGNORECASE)
_COUNTS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_HINT = "write a size as 75% (of the parameters), 6B or 100M (parameters), 12GB or 300MB (of weights)"


@dataclass(frozen=True)
class Target:
    """A size that a model is asked to have at most.

    Attributes:
        text: The target as it was written.
        kind: ``share`` of the model's parameters, ``parameters``, or ``bytes`` of the result's tensors.
        amount: The share, between 0 and 1, or the number of parameters or bytes.
    """

    text: str
    kind: str
    amount: float

    def parameters(self, model: int, each: float) -> int:
        """The largest number of parameters that is not above the target.

        Args:
            model: Parameters of the model before the cut.
            each: Bytes of a parameter in the result.
        """
        if self.kind == SHARE:
            # The relative slack keeps 29% of 100 from flooring to 28.
            return math.floor(self.amount * model * (1 + 1e-12))
        return math.floor(self.amount / each if self.kind == BYTES else self.amount)

    def spelled(self, parameters: int, model: int, each: float) -> str:
        """``parameters``, rounded up, as a target of the same kind."""
        if self.kind == SHARE:
            return f"{math.ceil(1000 * parameters / model) / 10:g}%"
        amount, unit = (parameters * each, "B") if self.kind == BYTES else (parameters, "")
        names = (("G", 1e9), ("M", 1e6), ("K", 1e3)) if unit else (("B", 1e9), ("M", 1e6), ("K", 1e3))
        name, factor = next(((name, factor) for name, factor in names if amount >= 10 * factor), names[-1])
        return f"{math.ceil(10 * amount / factor) / 10:g}{name}{unit}"


def parse_target(text: str) -> Target:
    """Read a target such as ``75%``, ``6B`` (parameters) or ``12GB`` (bytes, decimal; ``12GiB`` is binary).

    Raises:
        UsageError: ``text`` is not a target.
    """
    if not isinstance(text, str):
        raise UsageError(f"--to takes a size as text, not {text!r}", hint=_HINT)
    found = _TARGET.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"--to {text!r} is not a size", hint=_hint_for(text))
    number, percent, count, unit, binary = found.groups()
    if percent:
        target = Target(text.strip(), SHARE, float(number) / 100)
    elif count:
        target = Target(text.strip(), PARAMETERS, float(number) * _COUNTS[count.upper()])
    else:
        target = Target(text.strip(), BYTES, float(number) * (1024 if binary else 1000) ** (1 + "KMGT".index(unit.upper())))
    if target.kind == SHARE and not 0 < target.amount < 1:
        raise UsageError(f"--to {text} must lie between 0% and 100% of the model", hint="write the share that stays, such as 75%")
    if target.amount <= 0:
        raise UsageError(f"--to {text} is no size at all", hint=_HINT)
    return target


def parse_targets(text: str) -> tuple[Target, ...]:
    """Targets separated by commas, each once. Raises `UsageError` if one of them is not a target, or if there is none."""
    found = tuple(dict.fromkeys(parse_target(item) for item in text.split(",") if item.strip()))
    if not found:
        raise UsageError("--to names no size", hint=_HINT)
    return found


def _hint_for(text: str) -> str:
    """The spelling that was probably meant."""
    try:
        number = float(text)
    except ValueError:
        return _HINT
    if 0 < number < 1:
        return f"write {100 * number:g}% for a share of the parameters"
    return f"write {number:g}% for a share of the parameters; or {_HINT.removeprefix('write ')}" if 1 < number < 100 else _HINT
