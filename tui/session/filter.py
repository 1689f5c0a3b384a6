"""Filters such as ``lp>1e-3 & super`` or ``rank<200 | marked``, which choose channels. Pure numpy."""

from __future__ import annotations

import operator
import re
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.errors import UsageError
from chanfmt.base.text import one_line
from chanfmt.format import schema

if TYPE_CHECKING:
    from collections.abc import Mapping

HINT = "lp>1e-3 & super, rank<=200 | halo, share>1%, !marked"
_TERM = re.compile(r"(!?)\s*([A-Za-z_][\w./-]*)\s*(?:(<=|>=|==|!=|<|>|=)\s*(\S+))?")
_OPERATORS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
}


def filtered(text: str, columns: Mapping[str, np.ndarray], labels: np.ndarray, words: Mapping[str, np.ndarray]) -> np.ndarray:
    """Channels that ``text`` describes, bool (channel,).

    ``text`` is terms joined by ``&``, and such groups joined by ``|``. ``!`` before a term negates the term.

    Args:
        columns: Name to values, (channel,). An unknown value (NaN) fulfils no comparison.
        labels: Label of every channel, uint8 (channel,).
        words: Further words that a term may be, name to bool (channel,).

    Raises:
        UsageError: A term is not a condition, or names an unknown column or label.
    """
    masks = [
        np.logical_and.reduce([_term(term.strip(), columns, labels, words) for term in part.split("&")])
        for part in text.split("|")
    ]
    return np.asarray(np.logical_or.reduce(masks))


def counted(text: str, columns: Mapping[str, np.ndarray], labels: np.ndarray, words: Mapping[str, np.ndarray]) -> str:
    """How many channels `filtered` would choose, or why it would refuse ``text``, in words."""
    if not text:
        return "all"
    try:
        return f"{int(filtered(text, columns, labels, words).sum()):,} of {len(labels):,}"
    except UsageError as error:
        return one_line(error.message)


def refusal(text: str, columns: Mapping[str, np.ndarray], labels: np.ndarray, words: Mapping[str, np.ndarray]) -> str:
    """Why ``text`` is no filter for these channels: an error, or no channel that it chooses; empty if it is one."""
    if not text:
        return ""
    try:
        chosen = filtered(text, columns, labels, words)
    except UsageError as error:
        return one_line(f"{error.message}; {error.hint}" if error.hint else error.message)
    return "" if chosen.any() else "no channel here fits"


def _term(text: str, columns: Mapping[str, np.ndarray], labels: np.ndarray, words: Mapping[str, np.ndarray]) -> np.ndarray:
    match = _TERM.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not a condition", hint=HINT)
    negated, name, comparison, value = match.groups()
    if comparison is None:
        mask = words[name] if name in words else _label(name, labels, words)
    elif name == "label":
        mask = _OPERATORS[comparison](_label(value, labels, words), True)
    else:
        mask = _compared(name, comparison, value, columns)
    return ~mask if negated else mask


def _label(name: str, labels: np.ndarray, words: Mapping[str, np.ndarray]) -> np.ndarray:
    wanted = [value for value, label in schema.LABELS.items() if label.startswith(name.lower())]
    if not wanted:
        raise UsageError(
            f"{name!r} is not a label", hint=f"labels: {', '.join(schema.LABELS.values())}; other words: {', '.join(words)}"
        )
    return np.isin(labels, wanted)


def _compared(name: str, comparison: str, value: str, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    if name not in columns:
        raise UsageError(f"unknown column {name!r}", hint=f"choose from {', '.join(columns)}")
    try:
        number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        raise UsageError(f"{value!r} is not a number", hint=HINT) from None
    values = columns[name]
    # An unknown value is neither equal to a number nor unequal to it.
    return np.asarray(_OPERATORS[comparison](values, number)) & ~np.isnan(values)
