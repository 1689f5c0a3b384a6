"""What stays at any sparsity, under one score and one protection. Pure numpy."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.errors import UsageError
from chanfmt.format.unit import unit_rows
from surgery.planning.allocation import Candidate, Pool, ladder
from surgery.planning.coverage import evidence
from surgery.planning.methods import find_method, ranked_by_magnitude, scored
from surgery.planning.options import MAX_LAYER_SPARSITY
from surgery.planning.width import kept_units
from surgery.planning.written import field_groups

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chanfmt.format.reader import Atlas
    from chanfmt.format.records import Block
    from surgery.planning.coverage import Evidence
    from surgery.planning.options import PlanOptions


class Scores:
    """One method's scores of the FFNs that may be cut.

    Attributes:
        atlas: The atlas that the scores come from.
        blocks: The FFNs.
        method: The method's name.
        of: Block index to the FFN's scores, float64 of `Block.shape`.
        half: Block index to the tokens at which an expert's own scores decide as much as the norms of its weights.
    """

    def __init__(self, atlas: Atlas, method: str, seed: int, blocks: tuple[Block, ...]) -> None:
        self.atlas = atlas
        self.blocks = blocks
        self.method = method
        found = {block.index: scored(method, atlas, block, seed) for block in blocks}
        self.of = {index: item.values for index, item in found.items()}
        self.half = {index: item.half for index, item in found.items()}

    def comparable(self, block: Block) -> np.ndarray:
        """Scores that compare with those of other FFNs, float64 (row, channels).

        Raises:
            UsageError: No calibration token reached any expert.
        """
        rows = unit_rows(self.of[block.index])
        if block.n_experts and ranked_by_magnitude(self.method, self.atlas, block).all():
            raise UsageError(
                f"no calibration token reached any expert of layer {block.layer_index} ({block.module}), so its "
                "channels cannot be compared with those of other layers",
                hint="use --allocation uniform, or build the atlas on more text",
            )
        if find_method(self.method).standardised:
            spread = rows.std(axis=-1, keepdims=True)
            rows = (rows - rows.mean(axis=-1, keepdims=True)) / np.where(spread > 0, spread, 1)
        return rows

    def evidence(self, kept: Mapping[int, np.ndarray]) -> Evidence | None:
        """How well experts were covered, if a cut keeps ``kept``; None if the method ranks no expert by its tokens."""
        if not find_method(self.method).needs_tokens:
            return None
        return evidence(
            [
                (
                    np.asarray(self.atlas.stacks[block.stack].row("tokens", block.row)),
                    self.half[block.index],
                    float(kept[block.index].mean()),
                )
                for block in self.blocks
                if block.n_experts
            ]
        )

    def warnings(self) -> tuple[str, ...]:
        """A note on every FFN whose channels another method ranks than the requested one."""
        unseen = sum(int(ranked_by_magnitude(self.method, self.atlas, block).sum()) for block in self.blocks)
        if not unseen:
            return ()
        experts = sum(block.n_experts for block in self.blocks)
        return (f"{unseen:,} of {experts:,} experts got no calibration token; their channels are ranked by magnitude",)


class Choice:
    """What stays under one protection, at any sparsity. The channels are sorted once.

    Args:
        scores: Scores of the FFNs that may be cut.
        options: How the FFNs share the removal. The sparsity of ``options`` is not used.
        protected: Block index to a mask of the protected channels, bool of `Block.shape`.
    """

    def __init__(self, scores: Scores, options: PlanOptions, protected: Mapping[int, np.ndarray]) -> None:
        self._scores = scores
        self._options = options
        self._protected = protected

    @cached_property
    def orders(self) -> dict[int, np.ndarray]:
        """Block index to channel ids, best first: the first id is the last channel to go. Ints of `Block.shape`.

        If scores are equal, the lowest index comes first.
        """
        return {
            index: np.argsort(-np.where(self._protected[index], np.inf, values), axis=-1, kind="stable")
            for index, values in self._scores.of.items()
        }

    def kept(self, sparsity: float) -> dict[int, np.ndarray]:
        """Block index to a mask of the channels that stay, bool of `Block.shape`, for every FFN. Raises `UsageError` as `widths`."""
        widths = self.widths(sparsity)
        kept = {block.index: np.ones(block.shape, dtype=bool) for block in self._scores.atlas.blocks}
        for index, order in self.orders.items():
            np.put_along_axis(kept[index], order[..., widths[index] :], False, axis=-1)
        return kept

    def widths(self, sparsity: float) -> dict[int, int]:
        """Block index to the number of channels that stay (in each expert), for the FFNs that may be cut.

        Raises:
            UsageError: ``sparsity`` removes no channel or all channels, or more channels are protected than would stay.
        """
        uniform = self._uniform(sparsity)
        if self._options.allocation == "uniform":
            self._check_room(uniform)
            return uniform
        budget = sum(uniform[block.index] * len(block.experts) for block in self._scores.blocks)
        self._check_pool(budget, sparsity)
        widths = self._pool.widths(budget, self._options.multiple_of)
        return {block.index: width for block, width in zip(self._scores.blocks, widths, strict=True)}

    def _uniform(self, sparsity: float) -> dict[int, int]:
        """Widths if every FFN loses the same share; FFNs whose widths one config field sets are rounded together."""
        found: dict[int, int] = {}
        known: dict[tuple[int, tuple[int, ...]], int] = {}
        for units, factors, group in self._groups:
            if (units, factors) not in known:
                known[units, factors] = kept_units(units, factors, sparsity, self._options.multiple_of)
            found |= {index: factor * known[units, factors] for index, factor in group}
        return {block.index: found[block.index] for block in self._scores.blocks}

    @cached_property
    def _groups(self) -> list[tuple[int, tuple[int, ...], list[tuple[int, int]]]]:
        """For FFNs that share a config field: the integer that they share, the factors, and block indices with factors."""
        groups = []
        for places in field_groups(self._scores.blocks):
            members = [self._scores.blocks[place] for place in places]
            pairs = [(block.index, block.width_factor if block.width_field else 1) for block in members]
            factors = tuple(sorted({factor for _, factor in pairs}))
            groups.append((members[0].n_channels // pairs[0][1], factors, pairs))
        return groups

    @cached_property
    def _most_protected(self) -> dict[int, int]:
        """Block index to the number of protected channels, in the expert that has most of them."""
        return {block.index: int(self._protected[block.index].sum(axis=-1).max()) for block in self._scores.blocks}

    @cached_property
    def _pool(self) -> Pool:
        candidates = []
        for block in self._scores.blocks:
            most = block.n_channels - max(_fewest(block, self._cap), self._most_protected[block.index])
            rows = self._scores.comparable(block)
            candidates.append(
                Candidate(block.n_channels, len(block.experts), ladder(rows, unit_rows(self._protected[block.index]), most))
            )
        return Pool(candidates)

    @property
    def _cap(self) -> float:
        asked = self._options.max_layer_sparsity
        return MAX_LAYER_SPARSITY if asked is None else asked

    def _check_room(self, uniform: Mapping[int, int]) -> None:
        excess = {index: self._most_protected[index] - width for index, width in uniform.items()}
        short = [block for block in self._scores.blocks if excess[block.index] > 0]
        if not short:
            return
        worst = max(short, key=lambda block: excess[block.index])
        of = "an expert of " if worst.n_experts else ""
        others = f", and in {len(short) - 1} more" if len(short) > 1 else ""
        raise UsageError(
            f"the protected channels do not fit: {of}layer {worst.layer_index} protects {self._most_protected[worst.index]} "
            f"channels and would keep {uniform[worst.index]}, {excess[worst.index]} too few{others}",
            hint="lower --sparsity, or protect less",
        )

    def _check_pool(self, budget: int, sparsity: float) -> None:
        blocks, cap = self._scores.blocks, self._cap
        total = sum(len(block.experts) * block.n_channels for block in blocks)
        capped = sum(len(block.experts) * _fewest(block, cap) for block in blocks)
        if capped > budget:
            raise UsageError(
                f"--max-layer-sparsity {cap:g} lets at most {total - capped:,} of {total:,} channels go, and a "
                f"sparsity of {sparsity:g} removes {total - budget:,}",
                hint="lower --sparsity, or raise --max-layer-sparsity",
            )
        fixed = sum(len(block.experts) * max(_fewest(block, cap), self._most_protected[block.index]) for block in blocks)
        if fixed > budget:
            raise UsageError(
                f"the protected channels do not fit: they and --max-layer-sparsity {cap:g} keep {fixed:,} channels, "
                f"{fixed - budget:,} more than a sparsity of {sparsity:g} leaves",
                hint="lower --sparsity, or protect less",
            )


def _fewest(block: Block, cap: float) -> int:
    """Fewest channels that an FFN keeps if the share ``cap`` of it may go."""
    # The relative slack keeps 0.29 * 100 from flooring to 28.
    return max(1, block.n_channels - math.floor(cap * block.n_channels * (1 + 1e-12)))
