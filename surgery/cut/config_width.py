"""Find the config fields that hold FFN widths by trial, so that no table of models must be kept up to date.

A candidate is a field that equals the old width, a list of old widths, a divisor of the old width, or an unset field. The
field is edited, the stock model is rebuilt on the meta device, and *all* shapes are compared. The edit is right if it
changes the wanted axes and nothing else.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import ModelError
from surgery.cut.checkpoint.cuts import Cut, Widths, plan_cuts
from surgery.cut.stock import Shapes, meta_shapes, parse_config
from surgery.planning.plan import Change

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from chanfmt.models.safetensors import CheckpointIndex
    from surgery.planning.plan import BlockPlan, PruningPlan

FieldPath = tuple[str, ...]
Allowed = dict[str, frozenset[tuple[int, ...]]]
"""Parameter name to the shapes that it may have."""

_LIKELY_UNSET = ("inner", "inter", "ffn", "ff", "mlp", "feed")
_LIKELY_RATIO = ("ratio", "expansion", "mult", "factor")


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
    """

    widths: Widths
    cuts: dict[str, Cut]
    config: dict[str, Any]
    fields: dict[str, Change]
    allowed: Allowed
    switched: dict[str, Change] = field(default_factory=dict)


def find_layout(plan: PruningPlan, config: dict[str, Any], index: CheckpointIndex) -> Layout:
    """The smallest layout of ``plan``'s result that the stock class of ``config`` can load.

    If no config can give every FFN a width of its own, FFNs of a kind get the width of the widest of them and are padded
    with zero channels. If no field sets their width at all, they keep their old width.

    Raises:
        ModelError: A tensor cannot be cut, or a parameter of the plan is not in the model.
    """
    before = meta_shapes(config)
    last: ModelError | None = None
    for widths in _widths(plan):
        cuts = plan_cuts(plan, widths, index)
        allowed = allowed_shapes(plan, widths, cuts, index, before)
        try:
            edited, fields = narrow_config(config, before, allowed, plan, widths)
        except ModelError as error:
            last = error
        else:
            return Layout(widths, cuts, edited, fields, allowed)
    assert last is not None
    raise last


def _widths(plan: PruningPlan) -> Iterator[Widths]:
    """The widths of the layouts to try, smallest first, each once."""
    tried: list[Widths] = []
    groups: tuple[dict[str, Any], ...] = (
        {block.name: block.name for block in plan.blocks},
        {block.name: (block.stack, block.n_channels) for block in plan.blocks},
        {block.name: block.n_channels for block in plan.blocks},
    )
    for group in groups:
        widest: dict[Any, int] = defaultdict(int)
        for block in plan.blocks:
            widest[group[block.name]] = max(widest[group[block.name]], block.n_kept)
        tried.append({block.name: widest[group[block.name]] for block in plan.blocks})
    tried.append({block.name: block.n_channels for block in plan.blocks})
    for number, widths in enumerate(tried):
        if widths not in tried[:number]:
            yield widths


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


def in_model(parameter: str, shapes: Shapes) -> str:
    """The stock model's name of ``parameter``: with another head, names begin differently."""
    if parameter in shapes:
        return parameter
    found = [name for name in shapes if name.endswith(f".{parameter}") or parameter.endswith(f".{name}")]
    if len(found) != 1:
        raise ModelError(f"the model's parameter {parameter!r} does not exist in the stock class of its config")
    return found[0]


def narrow_config(
    config: dict[str, Any], before: Shapes, allowed: Allowed, plan: PruningPlan, widths: Widths
) -> tuple[dict[str, Any], dict[str, Change]]:
    """Change the width fields of ``config`` such that the stock model has ``allowed`` shapes.

    Args:
        config: Content of ``config.json``.
        before: Shapes of the stock model now, by parameter name.

    Returns:
        The edited copy, and the edited fields, dotted if nested.

    Raises:
        ModelError: No set of fields gives these shapes and no others.
    """
    missing = {name for name in before if before[name] not in allowed[name]}
    edits: dict[FieldPath, Any] = {}
    fields = dict(config_fields(parse_config(config).to_dict()))
    for path, new in _candidates(fields, plan, widths) if missing else ():
        if path in edits:
            continue
        moved = _moved(edit_config(config, edits | {path: new}), before)
        # A field that also changes another shape, or changes a shape to another value, holds another quantity.
        if moved and moved.keys() & missing and all(shape in allowed[name] for name, shape in moved.items()):
            edits[path] = new
            missing -= moved.keys()
            if not missing:
                break
    edited = edit_config(config, edits)
    after = meta_shapes(edited)
    if missing or after.keys() != allowed.keys() or any(shape not in allowed[name] for name, shape in after.items()):
        example = min(missing or allowed)
        raise ModelError(
            f"no config field of the model type {config.get('model_type')!r} sets the FFN width alone, so stock code "
            f"could not load the result (the field would have to change {example} from {list(before[example])} to "
            f"{' or '.join(str(list(shape)) for shape in sorted(allowed[example]))}, and nothing else)",
        )
    return edited, {".".join(path): Change(fields[path], value) for path, value in edits.items()}


def _moved(config: dict[str, Any], before: Shapes) -> Shapes:
    """Shapes that differ from ``before``; empty if the model cannot be built or has other names."""
    try:
        after = meta_shapes(config)
    except ModelError:
        return {}
    if after.keys() != before.keys():
        return {}
    return {name: shape for name, shape in after.items() if shape != before[name]}


def _candidates(fields: Mapping[FieldPath, Any], plan: PruningPlan, widths: Widths) -> Iterator[tuple[FieldPath, Any]]:
    """Fields of a config with values to try, likely fields first."""
    moves: dict[int, set[int]] = defaultdict(set)
    for block in plan.blocks:
        moves[block.n_channels].add(widths[block.name])
    moves = {old: news for old, news in moves.items() if news != {old}}
    for path, value in fields.items():
        if type(value) is int and value in moves:
            if len(moves[value]) > 1:
                layers = fields.get((*path[:-1], "num_hidden_layers"))
                yield from ((path, new) for new in _per_layer(plan, widths, value, layers))
            yield from ((path, new) for new in sorted(moves[value] - {value}))
    for path, value in fields.items():
        if isinstance(value, list) and value and all(type(item) is int for item in value) and set(value) & moves.keys():
            yield from ((path, new) for new in _lists(plan, widths, value))
    # An unset field stands for a multiple of another width. Names that suggest an FFN are tried first.
    unset = [path for path, value in fields.items() if value is None]
    unset.sort(key=lambda path: not any(word in path[-1] for word in _LIKELY_UNSET))
    for path in unset:
        for new in sorted({new for old, found in moves.items() for new in found - {old}}):
            yield path, new
    ratios = [path for path, value in fields.items() if type(value) in (int, float) and 0 < value < max(moves)]
    ratios.sort(key=lambda path: not any(word in path[-1] for word in _LIKELY_RATIO))
    for path in ratios:
        for old in moves:
            for new in sorted(moves[old] - {old}):
                value = fields[path] * new / old
                if (old / fields[path]).is_integer():
                    yield path, int(value) if type(fields[path]) is int and value.is_integer() else value


def _per_layer(plan: PruningPlan, widths: Widths, old: int, layers: Any) -> Iterator[list[int]]:
    """Lists of one width per layer, for a field that holds one number so far; one list per stack of FFNs."""
    if type(layers) is int and layers > 0:
        yield from _lists(plan, widths, [old] * layers)


def _lists(plan: PruningPlan, widths: Widths, values: list[int]) -> Iterator[list[int]]:
    """``values`` with new widths for the layers that are cut; one list per stack that fits ``values``."""
    stacks: dict[str, list[BlockPlan]] = defaultdict(list)
    for block in plan.blocks:
        # Stacks such as "decoder-8192" belong to the same list of layers as "decoder".
        stacks[block.stack.partition("-")[0]].append(block)
    for blocks in stacks.values():
        if all(block.layer_index < len(values) and values[block.layer_index] == block.n_channels for block in blocks):
            new = list(values)
            for block in blocks:
                new[block.layer_index] = widths[block.name]
            yield new


def config_fields(config: Mapping[str, Any], prefix: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """Every field of ``config`` that is not a table, with its value."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from config_fields(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def edit_config(config: dict[str, Any], edits: Mapping[FieldPath, Any]) -> dict[str, Any]:
    """A copy of ``config`` with fields set."""
    edited = copy.deepcopy(config)
    for path, value in edits.items():
        place = edited
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = value
    return edited
