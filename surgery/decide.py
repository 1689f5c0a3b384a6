"""Which channels stay: scores, protection and allocation put together, and what each protection cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.errors import UsageError
from surgery.allocation import Candidate, allocate, ladder
from surgery.methods import find_method, ranked_by_magnitude, score
from surgery.places import chosen_layers
from surgery.protect import count, protect_list
from surgery.protect_file import no_channels
from surgery.width import kept_width

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chanfmt.atlas import Atlas
    from chanfmt.records import Block
    from surgery.plan import PlanOptions

ALLOCATIONS = ("uniform", "global")
MAX_LAYER_SPARSITY = 0.7
"""Share of a layer that global allocation removes at most, where nothing else is asked."""


@dataclass(frozen=True)
class SelectorEffect:
    """What one ``--protect`` did.

    Attributes:
        selector: As it was written; a file without its directory.
        selected: Channels it names.
        new: Of these, channels that no earlier selector names and that are not unprotected.
        safe: Of these, channels that the method keeps without any protection.
        cost: Channels that would have stayed but for this selector, and that go for those it protects.
    """

    selector: str
    selected: int
    new: int
    safe: int
    cost: int


@dataclass(frozen=True, eq=False)
class Decision:
    """What stays.

    Attributes:
        kept: Block index to a mask of the channels that stay, bool of `Block.shape`.
        scope: Indices of the FFNs that could be cut.
        protection: What each selector did, before any inversion.
        protected, released: Channels that are protected, and that ``--unprotect`` kept from it.
        warnings: What the user should know.
    """

    kept: Mapping[int, np.ndarray]
    scope: frozenset[int]
    protection: tuple[SelectorEffect, ...]
    protected: int
    released: int
    warnings: tuple[str, ...]


def decide(atlas: Atlas, options: PlanOptions) -> Decision:
    """Decide what ``atlas``'s model keeps.

    Raises:
        UsageError: An option cannot mean anything for this model, or the protected channels do not fit.
        AtlasError: The atlas lacks what the method or a selector needs.
    """
    method = find_method(options.method)
    blocks = _in_scope(atlas, options)
    protected = protect_list(
        tuple(dict.fromkeys((*method.always_protects, *options.protect))), atlas, options.unprotect
    )
    chooser = _Chooser(atlas, options, blocks)
    chooser.check_room(protected.masks)
    union = no_channels(atlas)
    kept = bare = chooser.kept(union)
    effects = []
    for selection in protected.selections:
        before, new = kept, count(selection.new)
        if new:
            union = {index: mask | selection.new[index] for index, mask in union.items()}
            kept = chooser.kept(union)
        safe = {index: mask & bare[index] for index, mask in selection.new.items()}
        gone = {index: mask & ~kept[index] for index, mask in before.items()}
        effects.append(SelectorEffect(selection.name, selection.selected, new, count(safe), count(gone)))
    if options.invert:
        kept = _inverted(kept, blocks)
    return Decision(
        kept, frozenset(block.index for block in blocks), tuple(effects), protected.count, protected.released,
        (*protected.warnings, *chooser.warnings()),
    )


class _Chooser:
    """Scores of the FFNs in scope, and what they say under one protection or another."""

    def __init__(self, atlas: Atlas, options: PlanOptions, blocks: tuple[Block, ...]) -> None:
        self._atlas = atlas
        self._options = options
        self._blocks = blocks
        self._scores = {block.index: score(options.method, atlas, block, options.seed) for block in blocks}
        self._uniform = {block.index: kept_width(block.n_channels, options.sparsity, options.multiple_of) for block in blocks}
        self._budget = sum(self._uniform[block.index] * _units(block) for block in blocks)

    def kept(self, protected: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """What stays, as masks of all FFNs: the highest scores, of equal ones the lowest index."""
        widths = self._uniform if self._options.allocation == "uniform" else self._pooled(protected)
        kept = {block.index: np.ones(block.shape, dtype=bool) for block in self._atlas.blocks}
        for block in self._blocks:
            values = np.where(protected[block.index], np.inf, self._scores[block.index])
            order = np.argsort(-values, axis=-1, kind="stable")
            np.put_along_axis(kept[block.index], order[..., widths[block.index]:], False, axis=-1)
        return kept

    def check_room(self, protected: Mapping[int, np.ndarray]) -> None:
        """Raise `UsageError` where what may not go is more than what stays."""
        if self._options.allocation == "global":
            self._check_pool(protected)
            return
        most = {block.index: _most_protected(block, protected) for block in self._blocks}
        excess = {index: most[index] - width for index, width in self._uniform.items()}
        short = [block for block in self._blocks if excess[block.index] > 0]
        if not short:
            return
        worst = max(short, key=lambda block: excess[block.index])
        of = "an expert of " if worst.n_experts else ""
        others = f", and in {len(short) - 1} more" if len(short) > 1 else ""
        raise UsageError(
            f"the protected channels do not fit: {of}layer {worst.layer_index} protects {most[worst.index]} channels "
            f"and would keep {self._uniform[worst.index]}, {excess[worst.index]} too few{others}",
            hint="lower --sparsity, or protect less",
        )

    def warnings(self) -> tuple[str, ...]:
        """What was ranked by something else than was asked."""
        unseen = sum(int(ranked_by_magnitude(self._options.method, self._atlas, block).sum()) for block in self._blocks)
        if not unseen:
            return ()
        experts = sum(block.n_experts for block in self._blocks)
        return (f"{unseen:,} of {experts:,} experts got no calibration token; their channels are ranked by magnitude",)

    def _check_pool(self, protected: Mapping[int, np.ndarray]) -> None:
        cap, total = _cap(self._options), sum(_units(block) * block.n_channels for block in self._blocks)
        capped = sum(_units(block) * _fewest(block, cap) for block in self._blocks)
        if capped > self._budget:
            raise UsageError(
                f"--max-layer-sparsity {cap:g} lets {total - capped:,} of {total:,} channels go, and a sparsity of "
                f"{self._options.sparsity:g} needs {total - self._budget:,}",
                hint="lower --sparsity, or raise --max-layer-sparsity",
            )
        fixed = sum(_units(block) * max(_fewest(block, cap), _most_protected(block, protected)) for block in self._blocks)
        if fixed > self._budget:
            raise UsageError(
                f"the protected channels do not fit: with them and --max-layer-sparsity {cap:g} {fixed:,} channels stay, "
                f"{fixed - self._budget:,} more than a sparsity of {self._options.sparsity:g} leaves",
                hint="lower --sparsity, or protect less",
            )

    def _pooled(self, protected: Mapping[int, np.ndarray]) -> dict[int, int]:
        candidates = []
        for block in self._blocks:
            mask = protected[block.index]
            most = block.n_channels - max(_fewest(block, _cap(self._options)), _most_protected(block, protected))
            comparable = self._comparable(block)
            candidates.append(Candidate(
                block.n_channels, _units(block), ladder(comparable[0], np.atleast_2d(mask)[comparable[1]], most)
            ))
        widths = allocate(candidates, self._budget, self._options.multiple_of)
        return {block.index: width for block, width in zip(self._blocks, widths, strict=True)}

    def _comparable(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """Scores that compare with other FFNs', (row, channels), and which experts they are, bool (expert,)."""
        rows = np.atleast_2d(self._scores[block.index])
        used = np.ones(len(rows), dtype=bool)
        if block.n_experts:
            used = ~ranked_by_magnitude(self._options.method, self._atlas, block)
            if not used.any():
                raise UsageError(
                    f"no calibration token reached any expert of layer {block.layer_index} ({block.module}), so nothing "
                    "says what its channels are worth beside those of other layers",
                    hint="use --allocation uniform, or build the atlas on more text",
                )
        rows = rows[used]
        if find_method(self._options.method).standardised:
            spread = rows.std(axis=-1, keepdims=True)
            rows = (rows - rows.mean(axis=-1, keepdims=True)) / np.where(spread > 0, spread, 1)
        return rows, used


def _in_scope(atlas: Atlas, options: PlanOptions) -> tuple[Block, ...]:
    """The FFNs that may be cut."""
    for name in options.stack:
        if name not in atlas.stacks:
            raise UsageError(f"there is no stack {name!r}", hint=f"stacks: {', '.join(atlas.stacks)}")
    layers = chosen_layers(options.layers, atlas)
    blocks = tuple(block for block in atlas.blocks
                   if block.layer_index in layers and (not options.stack or block.stack in options.stack))
    if not blocks:
        raise UsageError(f"none of the layers {options.layers} is in {', '.join(options.stack)}",
                         hint="leave --layers or --stack out")
    return blocks


def _inverted(kept: Mapping[int, np.ndarray], blocks: tuple[Block, ...]) -> dict[int, np.ndarray]:
    """What was to go stays and the other way round, in ``blocks``."""
    for block in blocks:
        if kept[block.index].all():
            raise UsageError(f"--invert would remove all of layer {block.layer_index} ({block.module}), of which the plan "
                             "removes nothing", hint="leave the layer out with --layers, or use --allocation uniform")
    chosen = {block.index for block in blocks}
    return {index: ~mask if index in chosen else mask for index, mask in kept.items()}


def _units(block: Block) -> int:
    return max(1, block.n_experts)


def _most_protected(block: Block, protected: Mapping[int, np.ndarray]) -> int:
    """Protected channels of the FFN, or of the expert that has most of them."""
    return int(protected[block.index].sum(axis=-1).max())


def _cap(options: PlanOptions) -> float:
    return MAX_LAYER_SPARSITY if options.max_layer_sparsity is None else options.max_layer_sparsity


def _fewest(block: Block, cap: float) -> int:
    """Channels that an FFN keeps where ``cap`` of it may go."""
    # The relative slack keeps 0.29 * 100 from flooring to 28.
    return max(1, block.n_channels - math.floor(cap * block.n_channels * (1 + 1e-12)))
