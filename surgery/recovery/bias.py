"""What the channels that go wrote on average, added to the bias of their write projection.

The bias of FLAP (arXiv 2312.11983): W_P mu_P, with W_P the write vectors of the removed channels and mu_P
their mean activations, which the atlas holds; no model is run. Where the projections have no bias, a
switch of the config that gives them one is looked for, as widths are: by trying it.
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
"""Model types that have such a switch, to name in an error."""


@dataclass(frozen=True, eq=False)
class BiasPlan:
    """A cut whose write projections have biases.

    Attributes:
        plan: The plan, its FFNs with the biases that are new among their tensors.
        index: The checkpoint, with the new biases as tensors of no elements.
        layout: The cut of that, which fills them up with zeros, and the config that has them.
        values: Name of every FFN that is cut to its write bias afterwards, (outputs,) float64.
        added: Likewise, what that is more than before.
    """

    plan: PruningPlan
    index: CheckpointIndex
    layout: Layout
    values: Mapping[str, np.ndarray]
    added: Mapping[str, np.ndarray]

    def places(self) -> Iterator[tuple[TensorSlice, np.ndarray]]:
        """Where each of `values` goes."""
        for block in self.plan.blocks:
            if block.name in self.values:
                yield _write_bias(block), self.values[block.name]


def plan_biases(plan: PruningPlan, layout: Layout, index: CheckpointIndex, means: Mapping[str, np.ndarray]) -> BiasPlan:
    """Decide where biases go and what they are.

    Args:
        layout: How the cut is laid out without them.
        means: Name of every FFN to the mean activations of its channels, float64.

    Raises:
        ModelError: The model's class gives write projections no bias, or weights cannot be read.
    """
    if not all(any(item.role == "write_bias" for item in block.tensors) for block in plan.blocks if block.is_cut):
        plan, layout, index = _with_biases(plan, layout, index)
    weights = StoredWeights(index, "float32")
    values, added = {}, {}
    for block in plan.blocks:
        if block.is_cut:
            gone = block.removed_of(0)
            added[block.name] = weights.write(block)[:, gone].astype(np.float64) @ means[block.name][gone]
            values[block.name] = added[block.name] + _before(_write_bias(block), index)
    return BiasPlan(plan, index, layout, values, added)


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
            hint=f"use --recover lstsq or none; of the models without biases these can have them: {', '.join(SWITCHED)}",
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
    """Biases that the projections of a dense FFN could have."""
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
    """The bias that is there, float64; 0 for one that is new."""
    entry = index.tensors[item.tensor]
    if entry.shape == (0,):
        return 0.0
    values = numbers(entry).astype(np.float64)
    return values if item.index is None else values[item.index]
