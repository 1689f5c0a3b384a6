"""Find the config field that holds an FFN's width, by trying: no table of models to keep up to date.

A candidate is a config field that is the old width, or unset. It is edited, the stock model is
rebuilt on the meta device, and *all* shapes are compared: the edit is right where it moves the
wanted axes and nothing else.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from chanfmt.errors import ModelError
from surgery.stock import Shapes, meta_shapes, parse_config

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from chanfmt.models.checkpoint import CheckpointIndex
    from surgery.checkpoint.cuts import Cut
    from surgery.plan import PruningPlan

FieldPath = tuple[str, ...]

_LIKELY_UNSET = ("inner", "inter", "ffn", "ff", "mlp", "feed")


def wanted_shapes(
    plan: PruningPlan, index: CheckpointIndex, cuts: Mapping[str, Cut], before: Shapes
) -> Shapes:
    """Shapes that the loaded model must have after ``cuts``, by parameter name.

    Args:
        index: The uncut checkpoint.
        before: Shapes of the stock model for the uncut config.

    Raises:
        ModelError: A parameter of the plan is not in the model, or is laid out otherwise than on disk.
    """
    wanted = dict(before)
    for block in plan.blocks:
        for item in block.tensors:
            if item.tensor not in cuts:
                continue
            on_disk = index.tensors[item.tensor].shape
            if before.get(item.parameter) != on_disk:
                raise ModelError(
                    f"the tensor {item.tensor!r} has shape {list(on_disk)} on disk, and the model's parameter "
                    f"{item.parameter!r} {'has another' if item.parameter in before else 'does not exist'}"
                )
            wanted[item.parameter] = cuts[item.tensor].shape
    return wanted


def narrow_config(
    config: dict[str, Any], before: Shapes, wanted: Shapes, widths: Mapping[int, int]
) -> tuple[dict[str, Any], dict[str, int]]:
    """``config`` with its width fields changed so that the stock model has the ``wanted`` shapes.

    Args:
        config: Content of ``config.json``.
        before: Shapes of the stock model now, by parameter name.
        wanted: The same names with the shapes after the cut.
        widths: Old FFN width to new one.

    Returns:
        The edited copy, and the edited fields (dotted where nested) with their new values.

    Raises:
        ModelError: No field, or no set of fields, gives these shapes and no others.
    """
    missing = {name for name in before if before[name] != wanted[name]}
    edits: dict[FieldPath, int] = {}
    for path, new in _candidates(config, widths):
        moved = _moved(_edit(config, {path: new}), before)
        # A field that moves anything else than wanted, or moves it elsewhere, is another quantity.
        if moved and moved.keys() & missing and all(wanted.get(name) == shape for name, shape in moved.items()):
            edits[path] = new
            missing -= moved.keys()
            if not missing:
                break
    edited = _edit(config, edits)
    if missing or meta_shapes(edited) != wanted:
        example = min(missing or wanted)
        raise ModelError(
            f"no config field of the model type {config.get('model_type')!r} sets the FFN width alone, so stock code "
            f"could not load the result (it would have to move {example} from {list(before[example])} to "
            f"{list(wanted[example])} and nothing else)",
        )
    return edited, {".".join(path): value for path, value in edits.items()}


def _moved(config: dict[str, Any], before: Shapes) -> Shapes:
    """Shapes that differ from ``before``; empty where the model cannot be built or has other names."""
    try:
        after = meta_shapes(config)
    except ModelError:
        return {}
    if after.keys() != before.keys():
        return {}
    return {name: shape for name, shape in after.items() if shape != before[name]}


def _candidates(config: dict[str, Any], widths: Mapping[int, int]) -> Iterator[tuple[FieldPath, int]]:
    fields = dict(_fields(parse_config(config).to_dict()))
    for path, value in fields.items():
        if type(value) is int and value in widths:
            yield path, widths[value]
    # Unset fields mean a multiple of another width; names that suggest an FFN are tried first.
    unset = [path for path, value in fields.items() if value is None]
    unset.sort(key=lambda path: not any(word in path[-1] for word in _LIKELY_UNSET))
    for path in unset:
        for new in dict.fromkeys(widths.values()):
            yield path, new


def _fields(config: Mapping[str, Any], prefix: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _fields(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def _edit(config: dict[str, Any], edits: Mapping[FieldPath, int]) -> dict[str, Any]:
    edited = copy.deepcopy(config)
    for path, value in edits.items():
        place = edited
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = value
    return edited
