"""Label an atlas again with other settings, with or without the model's weights (spec sections "Labels", "Merging")."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Protocol

import numpy as np

from chanfmt.algebra import labels
from chanfmt.algebra.rewrite import check_complete, core_rho, dropped_names, label_variables
from chanfmt.base.errors import AtlasError, ModelError, UsageError
from chanfmt.format import schema

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chanfmt.format.records import AtlasContent, Block, LabelSettings, StackData


class Weights(Protocol):
    """The weights of one dense FFN or of one expert.

    Attributes:
        write: Write vectors as columns, float (d, m).
        reads: Gate rows (if the FFN has a gate) and up rows, each float (m, d).
    """

    @property
    def write(self) -> np.ndarray: ...
    @property
    def reads(self) -> list[np.ndarray]: ...


class WeightsOfFFNs(Protocol):
    """The weights of every FFN in an atlas, such as `chanfmt.models.stored.weights.StoredWeights`."""

    def ffn(self, ffn: Block, expert: int, /) -> Weights: ...


def relabelled(content: AtlasContent, settings: LabelSettings) -> AtlasContent:
    """``content`` labelled with ``settings``, without the model's weights.

    Connectivity and redundancy still refer to the core that they were made with (``core_rho``). With another
    ``support_size``, connectivity comes from ``connectivity_at``, and ``read_connectivity`` is dropped.

    Raises:
        UsageError: A setting is out of range, or cannot be changed after a build.
        AtlasError: The build is unfinished, or the atlas holds no connectivity for that ``support_size``.
    """
    _check(content, settings)
    stacks = []
    for stack in content.stacks:
        variables = dict(stack.variables)
        if settings.support_size != content.labels.support_size:
            for name in schema.resting_on(schema.SUPPORT):
                variables.pop(name, None)
            if "connectivity" in stack.variables:
                variables["connectivity"] = _connectivity_at(stack, settings.support_size)
        variables |= label_variables(variables, settings)
        stacks.append(dataclasses.replace(stack, variables=variables))
    return _with_stacks(content, settings, stacks, core_rho(stacks, content.core_rho, settings))


def relabelled_with_weights(content: AtlasContent, settings: LabelSettings, weights: WeightsOfFFNs) -> AtlasContent:
    """``content`` labelled with ``settings`` as a build would label it: everything that rests on weights is made again.

    Connectivity, connectivity to supports of other sizes and read connectivity are computed from the
    checkpoint, with one FFN in memory at a time. Redundancy was measured against the old core, so it is
    dropped if the core changes.

    Raises:
        UsageError: A setting is out of range, or cannot be changed after a build.
        AtlasError: The build is unfinished.
        ModelError: The checkpoint does not fit the FFN table.
    """
    _check(content, settings)
    made = {stack.name: _Connectivities(stack) for stack in content.stacks}
    place, support = "", None
    for (where, _), blocks in itertools.groupby(content.blocks, key=lambda block: (block.place, block.layer_index)):
        previous = support if where == place else None
        place, mass = where, None
        for block in blocks:
            stack = made[block.stack]
            for expert in block.experts:
                at = (block.row,) if expert is None else (block.row, expert)
                ffn = weights.ffn(block, expert or 0)
                if previous is not None and previous[-1] >= ffn.reads[0].shape[1]:
                    raise ModelError(
                        f"{block.module} reads {ffn.reads[0].shape[1]} dimensions, and the previous layer writes more"
                    )
                if previous is not None:
                    stack.read[at] = labels.read_connectivity(ffn.reads, previous)
                score = stack.data.variables[settings.score][at]
                sizes = labels.support_sizes(len(ffn.write), settings.support_size)
                stack.expect(sizes)
                # An FFN that no token reached has no core, so its connectivity stays unknown.
                if not np.isnan(score).all():
                    core = labels.supernodes(score, settings.rho)
                    stack.at[(slice(None), *at)] = labels.connectivity(ffn.write, core, sizes)
                    own = labels.write_support(ffn.write, core, settings.support_size)
                    stack.dimension[(slice(None), *at)], stack.share[(slice(None), *at)] = labels.written_dimensions(
                        ffn.write, own, schema.NEAREST
                    )
                    written = labels.write_mass(ffn.write, core)
                    mass = written if mass is None else mass + written
        support = None if mass is None else labels.top_indices(mass, min(settings.support_size, len(mass)))
    stacks = []
    for connectivities in made.values():
        variables = connectivities.variables(settings.support_size)
        if settings.rho != content.core_rho:
            for name in schema.resting_on(schema.CORRELATIONS):
                variables.pop(name, None)
        variables |= label_variables(variables, settings)
        stacks.append(dataclasses.replace(connectivities.data, variables=variables, supports=connectivities.sizes))
    return _with_stacks(content, settings, stacks, settings.rho)


class _Connectivities:
    """The variables of one stack that come from the weights, filled in FFN by FFN; NaN until then."""

    def __init__(self, data: StackData) -> None:
        self.data = data
        self.shape = (len(data.layers), *((data.n_experts,) if data.n_experts else ()), data.n_channels)
        self.read = np.full(self.shape, np.nan, dtype=np.float32)
        self.sizes: tuple[int, ...] = ()
        self.dimension = np.full((schema.NEAREST, *self.shape), -1, dtype=np.int32)
        self.share = np.full(self.dimension.shape, np.nan, dtype=np.float32)
        self.at = np.empty((0, *self.shape), dtype=np.float32)

    def expect(self, sizes: tuple[int, ...]) -> None:
        """Make room for supports of ``sizes``. Raises `ModelError` if an earlier FFN of the stack had other sizes."""
        if not self.sizes:
            self.sizes = sizes
            self.at = np.full((len(sizes), *self.shape), np.nan, dtype=np.float32)
        elif self.sizes != sizes:
            raise ModelError(f"the FFNs of {self.data.name} write to residual streams of different widths")

    def variables(self, size: int) -> dict[str, np.ndarray]:
        """The stack's variables, with the new values of those that come from the weights."""
        return {
            **self.data.variables,
            "read_connectivity": self.read,
            "connectivity_at": self.at,
            "connectivity": self.at[self.sizes.index(size)],
            "write_dimension": self.dimension,
            "write_share": self.share,
        }


def _check(content: AtlasContent, settings: LabelSettings) -> None:
    settings.check()
    for name in ("redundancy_top_k", "score", "ties"):
        if getattr(settings, name) != getattr(content.labels, name):
            raise UsageError(
                f"{name} is fixed when an atlas is built: {getattr(content.labels, name)}, not {getattr(settings, name)}"
            )
    check_complete(content, settings.score)


def _connectivity_at(stack: StackData, size: int) -> np.ndarray:
    if size not in stack.supports or "connectivity_at" not in stack.variables:
        sizes = ", ".join(map(str, stack.supports)) or "none"
        raise AtlasError(
            f"the atlas holds no connectivity to {size} dimensions for {stack.name}",
            hint=f"sizes that it holds: {sizes}; for another size, add --model MODEL",
        )
    return stack.variables["connectivity_at"][stack.supports.index(size)]


def _with_stacks(content: AtlasContent, settings: LabelSettings, stacks: Iterable[StackData], core: float) -> AtlasContent:
    stacks = tuple(stacks)
    lost = {name for stack in content.stacks for name in stack.variables}
    dropped = dropped_names({*content.dropped, *lost}, stacks)
    return dataclasses.replace(content, labels=settings, core_rho=core, stacks=stacks, dropped=dropped)
