"""The numbers of `surgery plan` for any sparsity. The atlas is read once; each sparsity is then a look-up. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.errors import AtlasError
from chanfmt.format import schema
from chanfmt.format.unit import unit_rows
from surgery.planning.choice import Choice, Scores
from surgery.planning.decide import in_scope
from surgery.planning.layouts import layout_rule
from surgery.planning.mass import lp_mass
from surgery.planning.methods import find_method
from surgery.planning.protect import protect_list
from surgery.planning.sizes import Sizes, planned_sizes, read_config
from surgery.planning.written import Size, field_groups

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chanfmt.format.reader import Atlas
    from chanfmt.format.records import Block
    from surgery.planning.options import PlanOptions


@dataclass(frozen=True)
class Left:
    """What one FFN keeps.

    Attributes:
        channels, channels_kept: Channels before and after, over all experts.
        supernodes, supernodes_kept: Supernodes before and after, over all experts.
        lp: LP times tokens of all channels (see `surgery.planning.mass.lp_mass`).
        lp_kept: LP times tokens of the kept channels.
        asked, removed: Parameters of the removed channels, and parameters by which the FFN becomes smaller in the file, as in
            `surgery.planning.written.Size`; 0 if the atlas does not say.
    """

    channels: int
    channels_kept: int
    supernodes: int
    supernodes_kept: int
    lp: float
    lp_kept: float
    asked: int = 0
    removed: int = 0

    @property
    def lp_share(self) -> float | None:
        """Share of the LP that stays, as `surgery.planning.plan.BlockPlan.lp_kept`; None if the LP is unknown or 0."""
        return self.lp_kept / self.lp if np.isfinite(self.lp) and self.lp > 0 else None

    def __add__(self, other: Left) -> Left:
        return Left(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class WhatIf:
    """One method, protection and allocation, evaluated at any sparsity.

    Attributes:
        protected: Number of protected channels, over all FFNs.
        warnings: What the user should know about scores and protection.

    Args:
        atlas: The atlas. It may be closed afterwards.
        options: Method, protection, allocation, scope and layout. Sparsity and inversion are not used.
        masks: Further channels to protect: block index to bool of `Block.shape`.

    Raises:
        UsageError: An option has no meaning for this model.
        AtlasError: The atlas is unfinished, or lacks what the method or a selector needs.
    """

    def __init__(self, atlas: Atlas, options: PlanOptions, masks: Mapping[int, np.ndarray] | None = None) -> None:
        if atlas.status != "complete":
            raise AtlasError(f"{atlas.path} is unfinished", hint="finish it with: atlas build ... --resume")
        selectors = tuple(dict.fromkeys((*find_method(options.method).always_protects, *options.protect)))
        listed = protect_list(selectors, atlas, options.unprotect)
        marked = masks or {}
        protected = {index: mask | marked[index] if index in marked else mask for index, mask in listed.masks.items()}
        scores = Scores(atlas, options.method, options.seed, in_scope(atlas, options))
        self.protected = sum(int(mask.sum()) for mask in protected.values())
        self.warnings = (*listed.warnings, *scores.warnings())
        self._choice = Choice(scores, options, protected)
        self._blocks = atlas.blocks
        self._parameters = atlas.model.parameters
        self._config = read_config(atlas.model.config)
        self._multiple_of = options.multiple_of
        self._groups = field_groups(self._blocks)
        self._rule = layout_rule(options.layout, self._blocks, self._config)
        self._rule.check()
        self._sums = {block.index: _Sums(atlas, block, self._choice.orders.get(block.index)) for block in atlas.blocks}

    def at(self, sparsity: float) -> tuple[Left, ...]:
        """What stays of every FFN, in model order.

        Raises:
            UsageError: ``sparsity`` removes no channel or all channels, or the protected channels do not fit.
        """
        widths = self._choice.widths(sparsity)
        kept = [widths.get(block.index, block.n_channels) for block in self._blocks]
        _, written = self._rule.widths(self._blocks, kept, self._multiple_of, self._groups)
        return tuple(
            self._sums[block.index].left(width, block.channel_parameters, stored)
            for block, width, stored in zip(self._blocks, kept, written, strict=True)
        )

    def sizes(self, rows: tuple[Left, ...]) -> Sizes | None:
        """Parameters, bytes and config before and after a cut that leaves ``rows``, as written; None if the atlas does not say."""
        if not self._parameters or not all(block.channel_parameters for block in self._blocks):
            return None
        after = self._parameters - sum(row.removed for row in rows)
        kept = [row.channels_kept // max(1, block.n_experts) for block, row in zip(self._blocks, rows, strict=True)]
        layout, widths = self._rule.widths(self._blocks, kept, self._multiple_of, self._groups)
        return planned_sizes(self._blocks, widths, self._parameters, after, self._config, layout)

    def is_refused(self, rows: tuple[Left, ...]) -> bool:
        """Whether a cut that leaves ``rows`` needs ``--allow-padding``, because its file would hardly shrink."""
        known = all(block.width_field is not None for block in self._blocks)
        return known and Size(sum(row.asked for row in rows), sum(row.removed for row in rows)).is_small


def total(rows: tuple[Left, ...]) -> Left:
    """The sum of ``rows``: what stays of the model."""
    result = rows[0]
    for row in rows[1:]:
        result += row
    return result


class _Sums:
    """Running sums of supernodes and LP of an FFN, best channel first."""

    def __init__(self, atlas: Atlas, block: Block, order: np.ndarray | None) -> None:
        stack = atlas.stacks[block.stack]
        core = unit_rows(stack.row("label", block.row) == schema.LABEL_SUPERNODE)
        mass = unit_rows(lp_mass(stack, block)) if "lp" in stack else np.full(core.shape, np.nan)
        if order is not None:
            core, mass = (np.take_along_axis(values, unit_rows(order), axis=-1) for values in (core, mass))
        # (width + 1,): entry k is the sum over the first k channels of every expert.
        self._core = np.concatenate(([0], np.cumsum(core.sum(axis=0))))
        self._mass = np.concatenate(([0.0], np.cumsum(mass.sum(axis=0))))
        self._units = len(core)

    def left(self, width: int, parameters: int, written: int) -> Left:
        """What is left by the best ``width`` channels, of so many parameters each, in a file in which the FFN is ``written`` wide."""
        channels = len(self._core) - 1
        return Left(
            channels * self._units,
            width * self._units,
            int(self._core[-1]),
            int(self._core[width]),
            float(self._mass[-1]),
            float(self._mass[width]),
            parameters * (channels - width) * self._units,
            parameters * (channels - written) * self._units,
        )
