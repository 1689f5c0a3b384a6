"""Combine the extensions of several atlases by the merge rule of each array (spec section "Extensions")."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.format.records import ExtensionGroup, ExtensionVariable

if TYPE_CHECKING:
    from collections.abc import Iterable


class ExtensionMerge:
    """The extensions of several atlases, added one atlas at a time in the order of a merge.

    An array is kept if every atlas has it with the same type, shape, dimensions and units, if the values of its dimensions
    are equal, and if its rule gives a value. An attribute is kept if all atlases agree.

    Attributes:
        lost: Paths of the arrays that could not be merged, without arrays whose rule is ``drop``.
    """

    def __init__(self, groups: Iterable[ExtensionGroup]) -> None:
        self.lost: dict[str, None] = {}
        self._groups = {
            group.path: dataclasses.replace(group, variables=tuple(item for item in group.variables if item.merge != "drop"))
            for group in groups
        }

    def add(self, groups: Iterable[ExtensionGroup]) -> None:
        """Combine with the extensions of another atlas."""
        others = {group.path: group for group in groups}
        for path in sorted(self._groups.keys() ^ others.keys()):
            self._lose(path, (self._groups.pop(path, None) or others[path]).variables)
        for path, group in self._groups.items():
            other = others[path]
            attributes = {
                name: value
                for name, value in group.attributes.items()
                if name in other.attributes and _same(value, other.attributes[name])
            }
            self._groups[path] = ExtensionGroup(path, attributes, self._variables(path, group, other))

    def groups(self) -> tuple[ExtensionGroup, ...]:
        """The merged groups, without groups that lost all of their arrays and attributes."""
        return tuple(group for group in self._groups.values() if group.variables or group.attributes)

    def _variables(self, path: str, group: ExtensionGroup, other: ExtensionGroup) -> tuple[ExtensionVariable, ...]:
        theirs = {item.name: item for item in other.variables}
        self._lose(path, [item for item in other.variables if item.name not in {own.name for own in group.variables}])
        # Sums over bins can be added only if the bins are the same.
        scales = {
            item.name
            for item in group.variables
            if _is_scale(item)
            and item.name in theirs
            and _is_scale(theirs[item.name])
            and _same(item.values, theirs[item.name].values)
        }
        kept = []
        for item in group.variables:
            if _is_scale(item):
                if item.name in scales:
                    kept.append(item)
                continue
            partner = theirs.get(item.name)
            fits = (
                partner is not None
                and scales.issuperset(item.dimensions)
                and all(getattr(item, name) == getattr(partner, name) for name in ("dimensions", "units", "merge"))
            )
            values = _combined(item.merge, item.values, partner.values) if fits and partner is not None else None
            if values is None:
                self._lose(path, [item])
            else:
                kept.append(dataclasses.replace(item, values=values))
        return tuple(kept)

    def _lose(self, path: str, items: Iterable[ExtensionVariable]) -> None:
        self.lost |= {f"{path}/{item.name}": None for item in items if not _is_scale(item) and item.merge != "drop"}


def added(first: np.ndarray, second: np.ndarray) -> np.ndarray | None:
    """``first + second`` in their own type; None if an integer or a float overflows."""
    with np.errstate(over="ignore"):
        total = first + second
    if total.dtype.kind == "u":
        fits = total >= first
    elif total.dtype.kind == "i":
        # The sum of two numbers of one sign has that sign, unless the sum wrapped around.
        fits = ((first ^ total) & (second ^ total)) >= 0
    else:
        fits = ~np.isinf(total)
    return total if bool(np.all(fits)) else None


def _is_scale(item: ExtensionVariable) -> bool:
    return item.dimensions == (item.name,)


def _combined(rule: str, first: Any, second: Any) -> Any | None:
    """Two arrays combined by ``rule``; None if the rule gives nothing."""
    if rule == "equal":
        return first if _same(first, second) else None
    if not (isinstance(first, np.ndarray) and isinstance(second, np.ndarray)) or (first.dtype, first.shape) != (
        second.dtype,
        second.shape,
    ):
        return None
    if rule == "sum":
        return added(first, second)
    return np.maximum(first, second) if rule == "max" else None


def _same(first: Any, second: Any) -> bool:
    """Whether two texts, numbers, lists or arrays agree to the bit."""
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return (first.dtype, first.shape, first.tobytes()) == (second.dtype, second.shape, second.tobytes())
    return type(first) is type(second) and first == second
