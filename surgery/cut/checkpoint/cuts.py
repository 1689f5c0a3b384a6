"""Derive from a plan and a checkpoint's index where every element of every changed tensor comes from."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.errors import ModelError
from chanfmt.models.safetensors import DTYPE_BITS, CheckpointIndex, TensorEntry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.format.records import TensorSlice
    from surgery.planning.plan import BlockPlan, PruningPlan

Widths = dict[str, int]
"""Name of every FFN of a plan to its width in the result: the kept channels, followed by zero channels up to this width."""


@dataclass(frozen=True, eq=False)
class Cut:
    """How a tensor is made from another one by moving its elements along one axis.

    Attributes:
        axis: The axis that runs over channels.
        positions: For every position on the new axis, the position on the old axis that its elements come from, or -1
            for zeros: int64 (1, length), or (experts, length) if the first axis runs over experts.
        shape: Shape of the new tensor.
    """

    axis: int
    positions: np.ndarray
    shape: tuple[int, ...]

    @property
    def by_expert(self) -> bool:
        """Whether the first axis runs over experts, each of which keeps channels of its own."""
        return len(self.positions) > 1

    def places(self, old: np.ndarray, line: int = 0) -> np.ndarray:
        """Where the elements at the positions ``old`` before the cut, which stay, are afterwards.

        Args:
            line: Number of the expert, if the cut is by expert.
        """
        # Zero channels come from nowhere. They may lie between two halves, so the positions are looked up in order of origin.
        order = np.argsort(self.positions[line], kind="stable")
        found: np.ndarray = order[np.searchsorted(self.positions[line][order], old)]
        return found

    def inverted(self, shape: tuple[int, ...]) -> Cut:
        """The cut that puts the elements back into a tensor of ``shape``, with zeros in place of removed elements."""
        positions = np.full((len(self.positions), shape[self.axis]), -1, dtype=np.int64)
        for old, new in zip(positions, self.positions, strict=True):
            there = np.flatnonzero(new >= 0)
            old[new[there]] = there
        return Cut(self.axis, positions, shape)


def plan_cuts(plan: PruningPlan, widths: Widths, index: CheckpointIndex) -> dict[str, Cut]:
    """Tensor name to `Cut`, for every tensor of an FFN that loses channels.

    One tensor may hold several roles of one FFN (gate and up as halves, or interleaved) and several of its experts.
    Elements that belong to no role stay.

    Raises:
        ModelError: A tensor is missing, has another shape than the plan says, is shared by two FFNs, or packs several
            values into a byte.
    """
    return {
        name: _cut(name, _entry(name, index).shape, items, block, widths[block.name])
        for name, items, block in _changed_tensors(plan, index)
    }


def plan_restoration(plan: PruningPlan, widths: Widths, index: CheckpointIndex) -> dict[str, Cut]:
    """The inverse of `plan_cuts`, for the checkpoint ``index`` that was made with it.

    Raises:
        ModelError: As `plan_cuts`.
    """
    cuts = {}
    for name, items, block in _changed_tensors(plan, index):
        found = _entry(name, index).shape
        axis, shape = _axis(name, found, items), list(found)
        runs = sum(item.index == items[0].index for item in items)
        shape[axis] += runs * (block.n_channels - widths[block.name])
        cut = _cut(name, tuple(shape), items, block, widths[block.name])
        if cut.shape != found:
            raise ModelError(f"the tensor {name!r} has shape {list(found)}, and the plan leaves {list(cut.shape)}")
        cuts[name] = cut.inverted(tuple(shape))
    return cuts


def _changed_tensors(plan: PruningPlan, index: CheckpointIndex) -> list[tuple[str, list[TensorSlice], BlockPlan]]:
    """Every tensor of every FFN that loses channels, with its slices."""
    found: list[tuple[str, list[TensorSlice], BlockPlan]] = []
    owners: dict[str, str] = {}
    for block in plan.blocks:
        by_tensor: dict[str, list[TensorSlice]] = defaultdict(list)
        for item in block.tensors:
            if item.axis is not None:
                by_tensor[item.tensor].append(item)
        if not by_tensor:
            raise ModelError(f"the plan names no tensor of {block.module}")
        for name, items in by_tensor.items():
            if owners.setdefault(name, block.name) != block.name:
                raise ModelError(f"the tensor {name!r} is shared by several FFNs, and each of them would keep other channels")
            if DTYPE_BITS[_entry(name, index).dtype] < 8:
                raise ModelError(
                    f"the tensor {name!r} is packed as {_entry(name, index).dtype} and cannot be cut", hint="dequantise first"
                )
            if block.is_cut:
                found.append((name, items, block))
    return found


def _entry(name: str, index: CheckpointIndex) -> TensorEntry:
    if name not in index.tensors:
        raise ModelError(f"the checkpoint {index.directory} has no tensor {name!r}")
    return index.tensors[name]


def _axis(name: str, shape: tuple[int, ...], items: Sequence[TensorSlice]) -> int:
    axis = items[0].axis
    if axis is None or axis >= len(shape) or any(item.axis != axis for item in items):
        raise ModelError(f"the plan cuts {name!r} along an axis that it does not have")
    return axis


def _cut(name: str, shape: tuple[int, ...], items: Sequence[TensorSlice], block: BlockPlan, width: int) -> Cut:
    axis = _axis(name, shape, items)
    experts = _experts(items, block)
    by_index: dict[int | None, list[tuple[TensorSlice, int]]] = defaultdict(list)
    for item, expert in zip(items, experts, strict=True):
        by_index[item.index].append((item, expert))
    if None not in by_index and (axis == 0 or sorted(index for index in by_index if index is not None) != list(range(shape[0]))):
        raise ModelError(f"the plan does not cut every expert in {name!r}")
    if None in by_index and len(by_index) > 1:
        raise ModelError(f"the plan takes {name!r} both for one expert and for all experts")
    order = [None] if None in by_index else list(range(shape[0]))
    lines = [_positions(name, shape, axis, by_index[index], block, width) for index in order]
    positions = np.stack(lines)
    return Cut(axis, positions, (*shape[:axis], positions.shape[1], *shape[axis + 1 :]))


def _experts(items: Sequence[TensorSlice], block: BlockPlan) -> list[int]:
    """The number of the expert that each of ``items`` belongs to. A table lists each role once per expert, in order."""
    if not block.n_experts:
        return [0] * len(items)
    numbers: dict[int, int] = {}
    seen: dict[str, int] = defaultdict(int)
    for item in block.tensors:
        numbers[id(item)] = seen[item.role]
        seen[item.role] += 1
    found = [numbers[id(item)] for item in items]
    if max(found) >= block.n_experts:
        raise ModelError(f"the plan lists more than {block.n_experts} experts of {block.module}")
    return found


def _positions(
    name: str, shape: tuple[int, ...], axis: int, items: Sequence[tuple[TensorSlice, int]], block: BlockPlan, width: int
) -> np.ndarray:
    """For every position on the new axis, the position on the old axis that it comes from, or -1 for zeros: int64."""
    length = shape[axis]
    claimed = np.zeros(length, dtype=bool)
    stays = np.ones(length, dtype=bool)
    runs = []
    for item, expert in items:
        if item.stop > length or len(range(item.start, item.stop, item.step)) != block.n_channels:
            raise ModelError(
                f"the plan sees {block.n_channels} channels in {name!r}, and the checkpoint's has shape {list(shape)}"
            )
        everything = item.indices(np.arange(block.n_channels))
        if claimed[everything].any():
            raise ModelError(f"the plan sees two roles in the same part of {name!r}")
        claimed[everything] = True
        stays[item.indices(block.removed_of(expert))] = False
        runs.append((int(everything[0]), int(everything[-1]) + 1))
    kept = np.flatnonzero(stays)
    added = width - block.n_kept
    if not added:
        return kept
    # Zero channels follow the last channel of each half. If roles interleave, zero channels follow the last of all roles.
    ends = np.repeat(_ends(runs), added)
    return np.insert(kept, np.searchsorted(kept, ends), -1)


def _ends(runs: Sequence[tuple[int, int]]) -> np.ndarray:
    """For every run of positions, the end of the group of overlapping runs that it belongs to."""
    ends: list[int] = []
    group: list[tuple[int, int]] = []
    for run in sorted(runs):
        if group and run[0] >= max(stop for _, stop in group):
            ends += [max(stop for _, stop in group)] * len(group)
            group = []
        group.append(run)
    return np.array(ends + [max(stop for _, stop in group)] * len(group), dtype=np.int64)
