"""Lay a plan's result out so that stock code loads it: the config fields that `chanfmt.models.widths` finds, group by group.

FFNs whose width one field sets form a group. A group gets the smallest widths that its field can give all of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import ModelError
from chanfmt.base.own_names import NARROWED_FIELD
from chanfmt.models.own import narrowed_map
from chanfmt.models.stock import Shapes, meta_shapes, meta_ties, parse_config
from chanfmt.models.widths import (
    FieldPath,
    WidthField,
    channel_parameters,
    config_fields,
    edit_config,
    in_model,
    width_fields,
)
from surgery.cut.checkpoint.cuts import Cut, Widths, plan_cuts
from surgery.cut.deci import DECI_ADDED, deci_config
from surgery.planning.layouts import CUSTOM, DECI, UNIFORM, layout_rule, layout_widths
from surgery.planning.plan import Change
from surgery.planning.shrink import check_size
from surgery.planning.written import size_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chanfmt.models.safetensors import CheckpointIndex
    from surgery.planning.plan import BlockPlan, PruningPlan

__all__ = ["Allowed", "Layout", "allowed_shapes", "check_layout", "config_fields", "edit_config", "find_layout", "in_model"]

ADDED = (*DECI_ADDED, NARROWED_FIELD)
"""Fields that a stock config may lack. They go again if the cut is undone."""
Allowed = dict[str, frozenset[tuple[int, ...]]]
"""Parameter name to the shapes that it may have."""


@dataclass(frozen=True, eq=False)
class Layout:
    """How a plan's result is laid out so that stock code loads it.

    Attributes:
        widths: Width of every FFN in the result.
        cuts: Name of every tensor that changes to its cut.
        config: The edited config.
        fields: Width fields that were edited, dotted if nested.
        allowed: Shapes that the stock model of the edited config may have.
        switched: Other fields that were edited. They stay edited when the cut is undone.
        set_by: Name of every FFN to the field that sets its width, as an atlas names it; empty if none does alone.
    """

    widths: Widths
    cuts: dict[str, Cut]
    config: dict[str, Any]
    fields: dict[str, Change]
    allowed: Allowed
    switched: dict[str, Change] = field(default_factory=dict)
    set_by: dict[str, str] = field(default_factory=dict)


def find_layout(plan: PruningPlan, config: dict[str, Any], index: CheckpointIndex) -> Layout:
    """The smallest layout of ``plan``'s result that the stock class of ``config`` can load, or the layout with code of the plan.

    In the stock class, FFNs that share a config field get the widths that the widest of them needs, and are padded with zero
    channels. In the layout custom, they are narrowed one by one. FFNs whose width no field sets alone keep their old width.

    Raises:
        ModelError: A tensor cannot be cut, a parameter of the plan is not in the model, or its class cannot be built.
        UsageError: The model cannot be laid out as the plan says.
    """
    before = meta_shapes(config)
    if plan.layout == DECI:
        return _deci_layout(plan, config, index, before)
    layout_rule(plan.layout, plan.blocks, config).check()
    found = width_fields(config, plan.blocks)
    ties = meta_ties(config)
    while True:
        widths = _widths(plan, found)
        cuts = plan_cuts(plan, widths, index)
        allowed = allowed_shapes(plan, widths, cuts, index, before)
        for names in ties:
            changed = [allowed[name] for name in names if allowed[name] != {before[name]}]
            allowed |= dict.fromkeys(names, changed[0]) if changed else {}
        for nudged in (False, True):
            edits = _edits(config, plan.blocks, found, _widths(replace(plan, layout=UNIFORM), found), nudged=nudged)
            if plan.layout == CUSTOM:
                edits |= _narrowing(config, plan, found, widths, edits, nudged=nudged)
            edited = edit_config(config, {path: change.after for path, change in edits.items()})
            wrong = _wrong(edited, allowed)
            if not wrong:
                fields = {".".join(path): change for path, change in edits.items()}
                set_by = {block.name: item.name if item else "" for block, item in zip(plan.blocks, found, strict=True)}
                return Layout(widths, cuts, edited, fields, allowed, set_by=set_by)
        failed = _failed(plan, found, widths, wrong, before)
        if not failed:
            raise ModelError(
                f"stock code of the model type {config.get('model_type')!r} could not load the result: {min(wrong)} would have "
                "another shape"
            )
        found = [None if item and item.name in failed else item for item in found]


def with_layout(plan: PruningPlan, asked: str, config: dict[str, Any]) -> PruningPlan:
    """``plan`` with the layout ``asked``, a key of `surgery.planning.layouts.LAYOUTS`, for a model with this ``config.json``.

    Raises:
        UsageError: The model cannot be laid out so.
    """
    plan = replace(plan, model_config=config)
    rule = layout_rule(asked, plan.blocks, config)
    rule.check()
    layout, _ = rule.widths(plan.blocks, [block.n_kept for block in plan.blocks], plan.multiple_of)
    return replace(plan, layout=layout)


def _deci_layout(plan: PruningPlan, config: dict[str, Any], index: CheckpointIndex, before: Shapes) -> Layout:
    """The layout of ``plan``'s result in which every FFN has the width that it keeps, and the config is DeciLM's."""
    layout_rule(DECI, plan.blocks, config).check()
    widths = {block.name: block.n_kept for block in plan.blocks}
    cuts = plan_cuts(plan, widths, index)
    allowed = allowed_shapes(plan, widths, cuts, index, before)
    edited, fields = deci_config(config, [block.n_kept for block in sorted(plan.blocks, key=lambda block: block.layer_index)])
    if wrong := _wrong(edited, allowed):
        raise ModelError(
            f"the result could not be loaded as DeciLM: {min(wrong)} would have another shape", hint="use --layout uniform"
        )
    return Layout(widths, cuts, edited, fields, allowed)


def check_layout(plan: PruningPlan, layout: Layout, index: CheckpointIndex) -> None:
    """Refuse a layout whose file shrinks by less than half of what ``plan`` asks for.

    Args:
        index: The uncut checkpoint.

    Raises:
        UsageError: The file would hardly shrink.
    """
    blocks = [replace(block, channel_parameters=channel_parameters(block, index)) for block in plan.blocks]
    widths = [layout.widths[block.name] for block in blocks]
    size = size_of(blocks, [block.n_kept for block in blocks], widths)
    if size is not None:
        check_size(plan, [layout.set_by.get(block.name, "") for block in blocks], widths, size)


def _widths(plan: PruningPlan, found: list[WidthField | None]) -> Widths:
    blocks = [
        replace(block, width_field=item.name if item else "", width_factor=item.factor if item else 0)
        for block, item in zip(plan.blocks, found, strict=True)
    ]
    widths = layout_widths(plan.layout, blocks, [block.n_kept for block in blocks], plan.multiple_of)
    return {block.name: width for block, width in zip(blocks, widths, strict=True)}


def _edits(
    config: dict[str, Any], blocks: Sequence[BlockPlan], found: Sequence[WidthField | None], widths: Widths, *, nudged: bool
) -> dict[FieldPath, Change]:
    """The fields to edit such that the FFNs have ``widths``.

    Args:
        nudged: Whether ratios are the next larger float: a class that rounds a width down may miss it by one.
    """
    before = dict(config_fields(parse_config(config).to_dict()))
    edits: dict[FieldPath, Change] = {}
    for block, item in zip(blocks, found, strict=True):
        if item is None or widths[block.name] == block.n_channels:
            continue
        units = widths[block.name] // item.factor
        old = before[item.path]
        if item.place is None:
            value = item.value_at(units)
            edits[item.path] = Change(old, math.nextafter(value, math.inf) if nudged and isinstance(value, float) else value)
            continue
        values = edits[item.path].after if item.path in edits else old if isinstance(old, list) else [old] * item.layers
        edits[item.path] = Change(old, [*values[: item.place], units, *values[item.place + 1 :]])
    return edits


def _narrowing(
    config: dict[str, Any],
    plan: PruningPlan,
    found: Sequence[WidthField | None],
    widths: Widths,
    edits: Mapping[FieldPath, Change],
    *,
    nudged: bool,
) -> dict[FieldPath, Change]:
    """The fields that give FFNs of ``widths`` which are narrower than the fields that they share, after ``edits`` of those.

    Empty if no FFN is narrower.
    """
    listed = []
    for block, item in zip(plan.blocks, found, strict=True):
        own = _edits(config, [block], [item], widths, nudged=nudged)
        fields = {".".join(path): change.after for path, change in own.items() if change != edits.get(path)}
        if fields and item is not None and item.place is None:
            listed.append({"module": block.module, "fields": fields})
    after = {NARROWED_FIELD: listed, "auto_map": narrowed_map(config["architectures"][0])}
    return {(key,): Change(config.get(key), value) for key, value in after.items()}


def _wrong(edited: dict[str, Any], allowed: Allowed) -> set[str]:
    """Names of the stock model's parameters that are missing, not expected, or of a shape that is not allowed."""
    try:
        after = meta_shapes(edited)
    except ModelError:
        return set(allowed)
    return {name for name in after.keys() | allowed.keys() if after.get(name) not in allowed.get(name, ())}


def _failed(plan: PruningPlan, found: list[WidthField | None], widths: Widths, wrong: set[str], before: Shapes) -> set[str]:
    """Names of the fields that do not set the widths as expected: those of FFNs with ``wrong`` parameters, or else all."""
    fields: dict[str, set[str]] = defaultdict(set)
    for block, item in zip(plan.blocks, found, strict=True):
        if item is not None and widths[block.name] < block.n_channels:
            fields[item.name] |= {in_model(each.parameter, before) for each in block.tensors if each.axis is not None}
    return {name for name, parameters in fields.items() if parameters & wrong} or set(fields)


def allowed_shapes(plan: PruningPlan, widths: Widths, cuts: Mapping[str, Cut], index: CheckpointIndex, before: Shapes) -> Allowed:
    """Shapes that the loaded model may have after ``cuts``, by parameter name.

    A parameter that is stored as a tensor of its own has the shape of that tensor. If transformers converts a parameter
    when it loads it, any one axis may lose the removed channels of the roles (and experts) that the parameter holds.

    Args:
        index: The uncut checkpoint.
        before: Shapes of the stock model for the uncut config.

    Raises:
        ModelError: A parameter of the plan is not in the model.
    """
    allowed: Allowed = {name: frozenset({shape}) for name, shape in before.items()}
    for block in plan.blocks:
        if widths[block.name] == block.n_channels:
            continue
        roles: dict[str, set[str]] = defaultdict(set)
        tensors: dict[str, set[str]] = defaultdict(set)
        for item in block.tensors:
            if item.axis is not None:
                roles[item.parameter].add(item.role)
                tensors[item.parameter].add(item.tensor)
        for parameter, names in tensors.items():
            name = in_model(parameter, before)
            tensor = next(iter(names))
            if len(names) == 1 and index.tensors[tensor].shape == before[name]:
                allowed[name] = frozenset({cuts[tensor].shape})
                continue
            removed = (block.n_channels - widths[block.name]) * len(roles[parameter])
            allowed[name] = frozenset(_narrowed(before[name], {removed, removed * max(1, block.n_experts)}))
    return allowed


def _narrowed(shape: tuple[int, ...], removed: set[int]) -> Iterator[tuple[int, ...]]:
    for axis, length in enumerate(shape):
        for count in removed:
            if count < length:
                yield (*shape[:axis], length - count, *shape[axis + 1 :])
