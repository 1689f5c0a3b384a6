"""Add the mean output of the removed channels to the bias of their write projection.

This is the bias of FLAP (arXiv 2312.11983): W_P mu_P, with W_P the write vectors of the removed channels and mu_P their mean
activations. The atlas holds these means, so no model is run. If the projections have no bias, a switch of the config that
gives them one is found by trial, as the width fields are.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.errors import ModelError
from chanfmt.models.safetensors import CheckpointIndex, TensorEntry
from chanfmt.models.stored.weights import StoredWeights, numbers
from surgery.cut.checkpoint.cuts import Cut
from surgery.cut.config_width import Layout, config_fields, edit_config, in_model
from surgery.cut.stock import meta_shapes, parse_config
from surgery.planning.plan import BlockPlan, Change, PruningPlan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from chanfmt.format.records import TensorSlice
    from surgery.cut.stock import Shapes

SWITCHED = ("llama", "smollm3", "granite", "nemotron", "helium")
"""Model types that have such a switch, for an error message."""


@dataclass(frozen=True, eq=False)
class BiasPlan:
    """A cut whose write projections have biases.

    Attributes:
        plan: The plan, with the new biases among the tensors of its FFNs.
        index: The checkpoint, with the new biases as tensors without elements.
        layout: The layout of the cut, which fills the new biases with zeros, and the config that has them.
        values: Name of every FFN that is cut to its new write bias, float64 (outputs,).
        before: Name of every FFN that is cut to its old write bias, float64 (outputs,).
    """

    plan: PruningPlan
    index: CheckpointIndex
    layout: Layout
    values: Mapping[str, np.ndarray]
    before: Mapping[str, np.ndarray]

    def places(self) -> Iterator[tuple[str, TensorSlice, np.ndarray]]:
        """Every write bias that changes: the name of its FFN, its slice, and its new values."""
        for block in self.plan.blocks:
            if block.name in self.values:
                yield block.name, _write_bias(block), self.values[block.name]


def plan_biases(plan: PruningPlan, layout: Layout, index: CheckpointIndex, means: Mapping[str, np.ndarray]) -> BiasPlan:
    """Decide which biases change, and compute their new values.

    Args:
        layout: The layout of the cut without new biases.
        means: Name of every FFN to the mean activations of its channels, float64 (channels,).

    Raises:
        ModelError: The model's class cannot give write projections a bias, or weights cannot be read.
    """
    if not all(any(item.role == "write_bias" for item in block.tensors) for block in plan.blocks if block.is_cut):
        plan, layout, index = _with_biases(plan, layout, index)
    weights = StoredWeights(index, "float32")
    values, before = {}, {}
    for block in plan.blocks:
        if block.is_cut:
            gone = block.removed_of(0)
            added = weights.write(block)[:, gone].astype(np.float64) @ means[block.name][gone]
            before[block.name] = np.broadcast_to(_before(_write_bias(block), index), added.shape)
            values[block.name] = added + before[block.name]
    return BiasPlan(plan, index, layout, values, before)


def _with_biases(plan: PruningPlan, layout: Layout, index: CheckpointIndex) -> tuple[PruningPlan, Layout, CheckpointIndex]:
    before = {name: next(iter(shapes)) for name, shapes in layout.allowed.items()}
    slices = {block.name: _new_slices(block, before) for block in plan.blocks}
    parameters = {item.parameter for items in slices.values() for item in items}
    needed = {item.parameter for block in plan.blocks if block.is_cut for item in slices[block.name] if item.role == "write_bias"}
    for path, value in config_fields(parse_config(layout.config).to_dict()):
        if value is not False or "bias" not in path[-1]:
            continue
        config = edit_config(layout.config, {path: True})
        shapes = _shapes(config)
        new = shapes.keys() - before.keys()
        if needed and needed <= new <= parameters and all(shapes.get(name) in layout.allowed[name] for name in before):
            break
    else:
        cut = next(block for block in plan.blocks if block.is_cut)
        raise ModelError(
            f"the write projection of {cut.module} has no bias, and no field of its config gives it one",
            hint=f"use --recover lstsq or none; these model types have such a field: {', '.join(SWITCHED)}",
        )
    tensors, cuts = dict(index.tensors), dict(layout.cuts)
    blocks = []
    for block in plan.blocks:
        items = [item for item in slices[block.name] if item.parameter in new]
        for item in items:
            weight = index.tensors[item.tensor.removesuffix("bias") + "weight"]
            tensors[item.tensor] = TensorEntry(weight.file, weight.dtype, (0,), weight.stop, weight.stop)
            cuts[item.tensor] = Cut(0, np.full((1, *shapes[item.parameter]), -1, dtype=np.int64), shapes[item.parameter])
        blocks.append(dataclasses.replace(block, tensors=(*block.tensors, *items)))
    return (
        dataclasses.replace(plan, blocks=tuple(blocks)),
        dataclasses.replace(
            layout,
            cuts=cuts,
            config=config,
            switched={".".join(path): Change(False, True)},
            allowed=layout.allowed | {name: frozenset({shapes[name]}) for name in new},
        ),
        dataclasses.replace(index, tensors=tensors),
    )


def _new_slices(block: BlockPlan, shapes: Shapes) -> list[TensorSlice]:
    """Slices of the biases that the projections of a dense FFN could have."""
    found = []
    for item in block.tensors:
        if item.tensor.endswith(".weight") and item.index is None and not item.role.endswith("_bias"):
            found.append(
                dataclasses.replace(
                    item,
                    role=f"{item.role}_bias",
                    tensor=item.tensor.removesuffix("weight") + "bias",
                    parameter=in_model(item.parameter, shapes).removesuffix("weight") + "bias",
                    axis=None if item.role == "write" else 0,
                )
            )
    return found


def _shapes(config: dict[str, Any]) -> Shapes:
    try:
        return meta_shapes(config)
    except ModelError:
        return {}


def _write_bias(block: BlockPlan) -> TensorSlice:
    return next(item for item in block.tensors if item.role == "write_bias")


def _before(item: TensorSlice, index: CheckpointIndex) -> np.ndarray | float:
    """The old bias, float64 (outputs,); 0 for a new bias."""
    entry = index.tensors[item.tensor]
    if entry.shape == (0,):
        return 0.0
    values = numbers(entry).astype(np.float64)
    return values if item.index is None else values[item.index]
