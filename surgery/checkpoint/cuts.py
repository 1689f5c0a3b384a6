"""From a plan and a checkpoint's index to the rows and columns that every tensor keeps."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.errors import ModelError
from chanfmt.models.checkpoint import DTYPE_BITS, CheckpointIndex, TensorEntry

if TYPE_CHECKING:
    from chanfmt.records import TensorSlice
    from surgery.plan import BlockPlan, PruningPlan


@dataclass(frozen=True, eq=False)
class Cut:
    """What remains of one tensor.

    Attributes:
        axis: The axis that runs over channels.
        positions: Ascending positions on it that stay, int64.
        shape: The tensor's shape afterwards.
    """

    axis: int
    positions: np.ndarray
    shape: tuple[int, ...]


def plan_cuts(plan: PruningPlan, index: CheckpointIndex) -> dict[str, Cut]:
    """Tensor name to `Cut`, for every tensor that the plan makes smaller.

    One tensor may hold several roles of one FFN (gate and up as halves, or interleaved); what
    belongs to no role stays.

    Raises:
        ModelError: A tensor is missing, has another shape than the plan was made for, is shared by
            two FFNs, or packs several values in a byte.
    """
    cuts: dict[str, Cut] = {}
    for block in plan.blocks:
        by_tensor: dict[str, list[TensorSlice]] = defaultdict(list)
        for item in block.tensors:
            if item.axis is not None:
                by_tensor[item.tensor].append(item)
        if not by_tensor:
            raise ModelError(f"the plan names no tensor of {block.module}")
        for name, slices in by_tensor.items():
            if name in cuts:
                raise ModelError(
                    f"the tensor {name!r} is shared by several FFNs, which would each keep their own channels"
                )
            if name not in index.tensors:
                raise ModelError(f"the checkpoint {index.directory} has no tensor {name!r}")
            cuts[name] = _cut(name, index.tensors[name], slices, block)
    return cuts


def _cut(name: str, entry: TensorEntry, slices: list[TensorSlice], block: BlockPlan) -> Cut:
    if DTYPE_BITS[entry.dtype] < 8:
        raise ModelError(f"the tensor {name!r} is packed as {entry.dtype} and cannot be cut", hint="dequantise first")
    axis = slices[0].axis
    if axis is None or axis >= len(entry.shape) or any(item.axis != axis for item in slices):
        raise ModelError(f"the plan cuts {name!r} along an axis that it does not have")
    length = entry.shape[axis]
    claimed = np.zeros(length, dtype=bool)
    stays = np.ones(length, dtype=bool)
    for item in slices:
        if item.stop > length or len(range(item.start, item.stop, item.step)) != block.n_channels:
            raise ModelError(
                f"the plan sees {block.n_channels} channels in {name!r}, and the checkpoint's has shape "
                f"{list(entry.shape)}"
            )
        everything = item.indices(np.arange(block.n_channels))
        if claimed[everything].any():
            raise ModelError(f"the plan sees two roles in the same part of {name!r}")
        claimed[everything] = True
        stays[item.indices(block.removed)] = False
    positions = np.flatnonzero(stays)
    return Cut(axis, positions, (*entry.shape[:axis], len(positions), *entry.shape[axis + 1:]))
