"""Add numbers per channel that another program made to an atlas, as its extensions (spec section "Extensions"). Pure numpy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.algebra.rewrite import check_finished
from chanfmt.base.choices import unknown
from chanfmt.base.errors import AtlasError, UsageError
from chanfmt.base.text import one_line
from chanfmt.format import columns, schema
from chanfmt.format.records import ExtensionGroup, ExtensionVariable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chanfmt.format.records import AtlasContent, StackData

MERGE = "equal"
"""The merge rule of a column for which none is given: a merge keeps the column if all inputs have the same values."""
UNITS = "1"
_LONGEST = 500
"""Characters of a description, and of units, at most."""
_STORED = {
    "f": {2: "f4", 4: "f4", 8: "f8"},
    "i": {1: "i4", 2: "i4", 4: "i4", 8: "i8"},
    "u": {1: "u1", 2: "i4", 4: "i8", 8: "i8"},
    "b": {1: "u1"},
}
"""Kind and bytes of a number to the type that an atlas stores it in. Nothing is lost, but for integers above 2^63."""


@dataclass(frozen=True)
class About:
    """What is said about a column besides its values.

    Attributes:
        units: CF units; None for those of the registry, or `UNITS`.
        description: What the number is; None for that of the registry, or the column's name.
        merge: One of `chanfmt.format.schema.EXTENSION_MERGE_RULES`; None for that of the registry, or `MERGE`.
    """

    units: str | None = None
    description: str | None = None
    merge: str | None = None

    def check(self) -> None:
        """Raise `UsageError` for a value that an atlas cannot hold."""
        if self.merge is not None and self.merge not in schema.EXTENSION_MERGE_RULES:
            raise unknown("merge rule", self.merge, schema.EXTENSION_MERGE_RULES)
        for name, text in (("units", self.units), ("description", self.description)):
            if text is not None and (not text.strip() or len(text) > _LONGEST or one_line(text, _LONGEST) != text):
                raise UsageError(
                    f"--{name} must be one line of 1 to {_LONGEST} printable characters", hint="write it in one line"
                )


def check_name(name: str) -> None:
    """Raise `UsageError` unless ``name`` can be the name of a column: ``x_owner/name``."""
    if not columns.NAME.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} is not the name of a column",
            hint="write x_OWNER/NAME, such as x_lab/hessian: the owner in lower case, both of letters, digits, '_', '-' (NAME also '.')",
        )
    owner, _, own = name.partition("/")
    if owner == schema.RESUME_EXTENSION:
        raise UsageError(f"{owner} is the owner of unfinished builds", hint="choose another owner, such as x_lab")
    if own in columns.INDICES:
        raise UsageError(f"{own} is the name of a dimension, so no column can have it", hint="choose another name")
    if owner == columns.OWNER and name not in columns.COLUMN_BY_NAME:
        raise unknown("well-known column", name, columns.COLUMN_BY_NAME, hint="give a column of your own an owner of your own")


def stored(values: np.ndarray, name: str) -> np.ndarray:
    """``values`` in the type that an atlas stores them in: f4, f8, i4, i8 or u1, little-endian.

    Raises:
        UsageError: They are not numbers, an integer is too large, a value is infinite, or the registry asks for another type.
    """
    code = _STORED.get(values.dtype.kind, {}).get(values.dtype.itemsize)
    if code is None:
        raise UsageError(f"{name} has the type {values.dtype}, which an atlas cannot hold", hint="save numbers, such as float32")
    if values.dtype.kind == "u" and values.size and int(values.max()) > np.iinfo(np.int64).max:
        raise UsageError(f"{name} holds {int(values.max())}, which is more than an integer of 64 bits can be")
    result = np.ascontiguousarray(values.astype(np.dtype(code).newbyteorder("<")))
    known = _known(name)
    if known is not None and known.dtype != code:
        fitted = _fitted(result, known.dtype)
        if fitted is None:
            raise UsageError(
                f"{name} is a well-known column of type {known.dtype}, and the values are {code}",
                hint=f"save them as {known.dtype}",
            )
        result = fitted
    if result.dtype.kind == "f" and np.isinf(result).any():
        place = ", ".join(map(str, np.argwhere(np.isinf(result))[0]))
        raise UsageError(f"{name} holds an infinite value at [{place}]", hint="write NaN for an unknown value")
    return result


def placed(values: np.ndarray, name: str, stacks: Sequence[StackData], stack: str | None = None) -> dict[str, np.ndarray]:
    """The stack that an array belongs to, by its name or by its shape, with the array.

    Args:
        values: (layer, channel), or (layer, expert, channel) for a stack of experts; layers in the order of the stack's rows.
        stacks: The stacks of the atlas.
        stack: Name of the stack; None if the shape decides.

    Raises:
        UsageError: No stack has the shape, or several have it.
    """
    fitting = [item for item in stacks if shape_of(item) == values.shape and stack in (None, item.name)]
    if len(fitting) == 1:
        return {fitting[0].name: values}
    if fitting:
        names = ", ".join(item.name for item in fitting)
        raise UsageError(
            f"{name} has the shape {_shape(values.shape)}, which several stacks have: {names}",
            hint=f"name the stack in a .safetensors or .npz file: {fitting[0].name}/{name}",
        )
    shapes = "; ".join(f"{item.name} {_shape(shape_of(item))}" for item in stacks if stack in (None, item.name))
    raise UsageError(
        f"{name} has the shape {_shape(values.shape)}, and no stack of the atlas has it",
        hint=f"shapes: {shapes} (layer, {'expert if there are any, ' if any(item.n_experts for item in stacks) else ''}channel)",
    )


def with_columns(
    content: AtlasContent, found: Mapping[str, Mapping[str, np.ndarray]], about: About | None = None, *, replace: bool = False
) -> AtlasContent:
    """``content`` with the columns ``found``, beside the extensions that it has.

    Args:
        found: Name of each column to its arrays: the name of a stack to (layer[, expert], channel). The arrays of
            `chanfmt.format.columns.DRIVING_ARRAYS` have the dimension ``driver`` besides.
        about: Units, description and merge rule of all of them; None for the defaults.
        replace: Whether a column that the atlas has already is replaced, in all stacks.

    Raises:
        UsageError: A name, type, shape, unit or rule is not possible, or the atlas has the column already.
        AtlasError: The build is unfinished, or the dimensions of an extension are not those of its stack.
    """
    about = about or About()
    about.check()
    check_finished(content)
    groups = {group.path: group for group in content.extensions}
    stacks = {stack.name: stack for stack in content.stacks}
    for name, arrays in found.items():
        if name not in columns.ARRAY_BY_NAME:
            check_name(name)
        owner, _, own = name.partition("/")
        units, description, merge = _said(name, about)
        held = [path for path, group in groups.items() if path in _paths(owner, stacks) and _has(group, own)]
        if held and not replace:
            raise UsageError(f"the atlas has {name} already", hint="add --replace, or choose another name")
        for path in held:
            others = tuple(item for item in groups[path].variables if item.name != own)
            groups[path] = dataclasses.replace(groups[path], variables=others)
        for where, values in arrays.items():
            stack = stacks[where]
            further = {columns.DRIVER: values.shape[-1]} if name in columns.ARRAY_BY_NAME else {}
            if values.shape != (*shape_of(stack), *further.values()):
                raise UsageError(f"{name} has the shape {_shape(values.shape)}, and {where} has {_shape(shape_of(stack))}")
            path = f"{owner}/{where}"
            group = groups.get(path, ExtensionGroup(path))
            dimensions = (*_dimensions(stack), *further)
            column = ExtensionVariable(own, dimensions, stored(values, name), description, units, merge)
            groups[path] = dataclasses.replace(group, variables=(*_with_scales(group, stack, further), column))
    return dataclasses.replace(
        content, extensions=tuple(group for group in groups.values() if group.attributes or _columns(group))
    )


def shape_of(stack: StackData) -> tuple[int, ...]:
    """Shape of a column in ``stack``: (layer, channel), or (layer, expert, channel)."""
    experts = (stack.n_experts,) if stack.kind == "experts" else ()
    return (len(stack.layers), *experts, stack.n_channels)


def _known(name: str) -> columns.Column | None:
    """What the registry says about the column or array ``name``; None if it is not well known."""
    return columns.COLUMN_BY_NAME.get(name) or columns.ARRAY_BY_NAME.get(name)


def _fitted(values: np.ndarray, code: str) -> np.ndarray | None:
    """``values`` in the type ``code`` if that loses nothing, or rounds floats to float32; otherwise None."""
    if code == "f4":
        return values.astype("<f4") if values.dtype.kind == "f" else None
    if values.dtype.kind == "f":
        return None
    limits = np.iinfo(code)
    fits = not values.size or (int(values.min()) >= limits.min and int(values.max()) <= limits.max)
    return values.astype(np.dtype(code).newbyteorder("<")) if fits else None


def _said(name: str, about: About) -> tuple[str, str, str]:
    """Units, description and merge rule of the column ``name``. A well-known column has those of the registry."""
    known = _known(name)
    if known is None:
        return about.units or UNITS, about.description or name, about.merge or MERGE
    for what, given, meant in (("units", about.units, known.units), ("merge rule", about.merge, known.merge)):
        if given is not None and given != meant:
            raise UsageError(
                f"the {what} of the well-known column {name} must be {meant}, not {given}",
                hint=f"leave out --{what.split()[0]}, or give the column an owner of your own",
            )
    return known.units, about.description or known.long_name, known.merge


def _columns(group: ExtensionGroup) -> list[ExtensionVariable]:
    """The variables of ``group`` that are not scales of its dimensions."""
    return [item for item in group.variables if item.dimensions != (item.name,)]


def _dimensions(stack: StackData) -> tuple[str, ...]:
    return ("layer", "expert", "channel") if stack.kind == "experts" else ("layer", "channel")


def _with_scales(group: ExtensionGroup, stack: StackData, further: Mapping[str, int]) -> tuple[ExtensionVariable, ...]:
    """The variables of ``group``, with the scales of the stack's dimensions and of ``further``, dimensions to their lengths.

    Raises:
        AtlasError: The group has scales of other lengths.
    """
    values = {"layer": stack.layers, "expert": np.arange(stack.n_experts), "channel": np.arange(stack.n_channels)}
    values |= {name: np.arange(length) for name, length in further.items()}
    about = {item.name: item.long_name for item in schema.INDEX_VARIABLES} | {columns.DRIVER: "rank of a driving token"}
    found = list(group.variables)
    for name in (*_dimensions(stack), *further):
        held = next((item for item in found if item.name == name), None)
        if held is None:
            found.append(ExtensionVariable(name, (name,), np.asarray(values[name], dtype="<i4"), about[name], "1", ""))
        elif held.dimensions != (name,) or len(held.values) != len(values[name]):
            raise AtlasError(f"/{group.path}/{name} is not the {name} dimension of {stack.name}", hint="choose another owner")
    return tuple(found)


def _paths(owner: str, stacks: Mapping[str, StackData]) -> set[str]:
    return {f"{owner}/{stack}" for stack in stacks}


def _has(group: ExtensionGroup, name: str) -> bool:
    return any(item.name == name for item in group.variables)


def _shape(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"
