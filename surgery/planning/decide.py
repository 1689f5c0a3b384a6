"""Decide which channels stay: scores, protection and allocation together, and the cost of each protection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chanfmt.base.errors import UsageError
from surgery.planning.addresses import chosen_layers
from surgery.planning.choice import Choice, Scores
from surgery.planning.methods import find_method, unprotected_halo
from surgery.planning.protect import count, protect_list
from surgery.planning.protect_file import no_channels

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from chanfmt.format.reader import Atlas
    from chanfmt.format.records import Block
    from surgery.planning.coverage import Evidence
    from surgery.planning.options import PlanOptions


@dataclass(frozen=True)
class SelectorEffect:
    """What one ``--protect`` did.

    Attributes:
        selector: The selector as it was written; a file is named without its directory.
        selected: Channels that the selector names.
        new: Selected channels that no earlier selector names and that are not unprotected.
        safe: New channels that the method keeps without any protection.
        cost: Channels that stay with the earlier selectors alone and go once this selector is added.
    """

    selector: str
    selected: int
    new: int
    safe: int
    cost: int


@dataclass(frozen=True, eq=False)
class Decision:
    """What a plan keeps.

    Attributes:
        kept: Block index to a mask of the channels that stay, bool of `Block.shape`.
        scope: Indices of the FFNs that could be cut.
        protection: What each selector did, before any inversion.
        protected, released: Channels that are protected, and channels that ``--unprotect`` released.
        warnings: What the user should know.
        evidence: How well the experts that could be cut were covered; None if no expert is ranked by its tokens.
    """

    kept: Mapping[int, np.ndarray]
    scope: frozenset[int]
    protection: tuple[SelectorEffect, ...]
    protected: int
    released: int
    warnings: tuple[str, ...]
    evidence: Evidence | None = None


def decide(atlas: Atlas, options: PlanOptions) -> Decision:
    """Decide which channels ``atlas``'s model keeps.

    Raises:
        UsageError: An option has no meaning for this model, or the protected channels do not fit.
        AtlasError: The atlas lacks what the method or a selector needs.
    """
    method = find_method(options.method)
    blocks = in_scope(atlas, options)
    protected = protect_list(tuple(dict.fromkeys((*method.always_protects, *options.protect))), atlas, options.unprotect)
    scores = Scores(atlas, options.method, options.seed, blocks)
    # An error about channels that do not fit should count all protected channels, not those up to the first selector too many.
    Choice(scores, options, protected.masks).widths(options.share)
    union = no_channels(atlas)
    kept = bare = Choice(scores, options, union).kept(options.share)
    effects = []
    for selection in protected.selections:
        before, new = kept, count(selection.new)
        if new:
            union = {index: mask | selection.new[index] for index, mask in union.items()}
            kept = Choice(scores, options, union).kept(options.share)
        safe = {index: mask & bare[index] for index, mask in selection.new.items()}
        gone = {index: mask & ~kept[index] for index, mask in before.items()}
        effects.append(SelectorEffect(selection.name, selection.selected, new, count(safe), count(gone)))
    if options.invert:
        kept = _inverted(kept, blocks)
    return Decision(
        kept,
        frozenset(block.index for block in blocks),
        tuple(effects),
        protected.count,
        protected.released,
        (*protected.warnings, *scores.warnings(), *unprotected_halo(options.method, atlas, blocks)),
        scores.evidence(kept),
    )


def in_scope(atlas: Atlas, options: PlanOptions) -> tuple[Block, ...]:
    """The FFNs that may be cut. Raises `UsageError` if the options name none."""
    for name in options.stack:
        if name not in atlas.stacks:
            raise UsageError(f"there is no stack {name!r}", hint=f"stacks: {', '.join(atlas.stacks)}")
    layers = chosen_layers(options.layers, atlas)
    blocks = tuple(
        block for block in atlas.blocks if block.layer_index in layers and (not options.stack or block.stack in options.stack)
    )
    if not blocks:
        raise UsageError(
            f"none of the layers {options.layers} is in the stack {', '.join(options.stack)}",
            hint="leave out --layers or --stack",
        )
    return blocks


def _inverted(kept: Mapping[int, np.ndarray], blocks: tuple[Block, ...]) -> dict[int, np.ndarray]:
    """``kept`` with kept and removed channels swapped in ``blocks``."""
    for block in blocks:
        if kept[block.index].all():
            raise UsageError(
                f"--invert would remove every channel of layer {block.layer_index} ({block.module}): without it, the plan removes none",
                hint="leave the layer out with --layers, or use --allocation uniform",
            )
    chosen = {block.index for block in blocks}
    return {index: ~mask if index in chosen else mask for index, mask in kept.items()}
