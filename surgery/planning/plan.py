"""What a cut will do, as data: which channels every FFN of a model keeps. Pure numpy."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base import html
from chanfmt.base.errors import AtlasError
from chanfmt.base.text import one_line
from chanfmt.format import schema
from surgery.planning.decide import SelectorEffect, decide
from surgery.planning.formats import GGUF, SAFETENSORS, uneven_gguf
from surgery.planning.layouts import UNIFORM, layout_notes, layout_rule, layout_widths, needs_code
from surgery.planning.mass import lp_mass
from surgery.planning.selectors import file_name
from surgery.planning.sized import Sized, sized
from surgery.planning.sizes import Sizes, parameters_text, planned_sizes, read_config
from surgery.planning.written import Size, size_of, width_warnings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chanfmt.format.reader import Atlas, Stack
    from chanfmt.format.records import Block, TensorSlice
    from surgery.planning.coverage import Evidence
    from surgery.planning.formats import FileBytes
    from surgery.planning.options import PlanOptions

CHECK_TOKENS = 128
"""Tokens of the atlas's first sequence that a plan carries, so that its result can be checked."""


@dataclass(frozen=True)
class PlannedModel:
    """The model that a plan is for, as its atlas names it (see `chanfmt.format.records.ModelRecord`)."""

    id: str
    revision: str
    source: str
    model_type: str
    architectures: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True, eq=False, repr=False)
class BlockPlan:
    """What one FFN keeps.

    Attributes:
        name: The FFN's name in the plan file: its module, with a number if another FFN has the same module.
        layer_index, place, module, stack, n_channels, n_experts, tensors, width_field, width_factor, channel_parameters: As
            in `chanfmt.format.records.Block`.
        kept: Ids of the channels that stay, ascending, int32: (kept,), or (expert, kept) if the FFN has experts.
        supernodes, supernodes_kept: Supernodes before and after the cut, over all experts.
        lp_kept: Share of the FFN's LP that its kept channels hold; None if the LP is unknown or 0.
    """

    name: str
    layer_index: int
    place: str
    module: str
    stack: str
    n_channels: int
    n_experts: int
    tensors: tuple[TensorSlice, ...]
    kept: np.ndarray
    supernodes: int
    supernodes_kept: int
    lp_kept: float | None
    width_field: str | None = None
    width_factor: int = 0
    channel_parameters: int = 0

    def __repr__(self) -> str:
        experts = f"{self.n_experts} experts x " if self.n_experts else ""
        return f"<BlockPlan {one_line(self.name)!r}: {experts}{self.n_kept:,} of {self.n_channels:,} channels kept>"

    @property
    def n_kept(self) -> int:
        """Channels that stay, of each expert if the FFN has experts."""
        return int(self.kept.shape[-1])

    @property
    def is_cut(self) -> bool:
        """Whether the plan removes any channel of this FFN."""
        return self.n_kept < self.n_channels

    def kept_of(self, expert: int) -> np.ndarray:
        """Ascending ids of the channels that stay in expert number ``expert`` (0 for a dense FFN), int32 (kept,)."""
        return self.kept[expert] if self.n_experts else self.kept

    def removed_of(self, expert: int) -> np.ndarray:
        """Ascending ids of the channels that go from expert number ``expert`` (0 for a dense FFN), int32 (removed,)."""
        mask = np.ones(self.n_channels, dtype=bool)
        mask[self.kept_of(expert)] = False
        return np.flatnonzero(mask).astype(np.int32)


@dataclass(frozen=True, eq=False, repr=False)
class PruningPlan:
    """Which channels every FFN of a model keeps, and why.

    Attributes:
        model: The model that the plan is for. Its fingerprint decides whether a checkpoint is that model.
        method, seed, sparsity, multiple_of, allocation, max_layer_sparsity, layers, stack, invert: What was asked, as
            in `surgery.planning.options.PlanOptions`. ``layers`` None and an empty ``stack`` mean all of them.
        protection: What each selector of ``protect`` and of the method did, before any inversion.
        unprotect: The selectors that took channels out of protection.
        protected, released: Channels that were protected, and channels that ``unprotect`` released; over all FFNs.
        scope_channels: Channels of the FFNs that could be cut, over all experts.
        atlas_sha256: ``content_sha256`` of the atlas.
        atlas_source: File and commit of the atlas on the Hub; empty for a local file.
        calibration: What the atlas was measured on, for people.
        check_tokens: Token ids to compare logits on, at most `CHECK_TOKENS`; empty if the atlas stores none.
        blocks: One `BlockPlan` per FFN, in model order.
        extra: FFNs in the files that stock transformers does not load, and that a result was cut in too. A plan that was made
            from an atlas has none.
        parameters: Parameters of the model before the cut; 0 if the plan does not say.
        layout: How the result is laid out: one of `surgery.planning.layouts.WRITTEN`.
        warnings: What the user should know. A plan file does not hold them.
        sized: The size that ``sparsity`` was found for; None if the sparsity was asked for. A plan file does not hold it.
        model_config: The model's config, from which sizes follow; empty if the atlas holds none. A plan file does not hold it.
        evidence: As in `surgery.planning.decide.Decision`. A plan file does not hold it.
        format, file_bytes: As in `surgery.planning.options.PlanOptions`. A plan file does not hold them.
    """

    model: PlannedModel
    method: str
    protection: tuple[SelectorEffect, ...]
    unprotect: tuple[str, ...]
    protected: int
    released: int
    seed: int
    sparsity: float
    multiple_of: int | None
    allocation: str
    max_layer_sparsity: float | None
    layers: str | None
    stack: tuple[str, ...]
    invert: bool
    scope_channels: int
    atlas_sha256: str
    calibration: str
    check_tokens: tuple[int, ...]
    blocks: tuple[BlockPlan, ...]
    atlas_source: str = ""
    extra: tuple[BlockPlan, ...] = ()
    parameters: int = 0
    layout: str = UNIFORM
    warnings: tuple[str, ...] = ()
    sized: Sized | None = None
    evidence: Evidence | None = None
    model_config: Mapping[str, Any] = field(default_factory=dict)
    format: str = SAFETENSORS
    file_bytes: FileBytes | None = None

    def __repr__(self) -> str:
        name = one_line(self.model.id.rstrip("/").rsplit("/", 1)[-1])
        size = "" if self.sizes is None else f"{parameters_text(*self.sizes.parameters)}, "
        return (
            f"<PruningPlan of {name}: {size}{len(self.blocks)} FFNs, {self.channels:,} to {self.channels_kept:,} channels "
            f"({-self.sparsity_reached:+.1%}), {one_line(self.method)}>"
        )

    def _repr_html_(self) -> str:
        """The plan for a notebook: its `repr`, and a row per FFN."""
        return f"<p>{html.inline(repr(self))}</p>\n{html.table(*layer_rows(self))}"

    @property
    def protect(self) -> tuple[str, ...]:
        """The selectors whose channels were protected."""
        return tuple(effect.selector for effect in self.protection)

    @property
    def channels(self) -> int:
        """Channels of all FFNs before the cut."""
        return sum(block.n_channels * max(1, block.n_experts) for block in self.blocks)

    @property
    def channels_kept(self) -> int:
        """Channels of all FFNs after the cut."""
        return sum(block.kept.size for block in self.blocks)

    @property
    def sparsity_reached(self) -> float:
        """Share of all channels that the plan removes."""
        return 1 - self.channels_kept / self.channels

    @property
    def scope_sparsity_reached(self) -> float:
        """Share that the plan removes of the channels of the FFNs that could be cut."""
        return (self.channels - self.channels_kept) / self.scope_channels

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Width of each FFN in the result: its kept channels, followed by zero channels up to the width that the layout can give."""
        kept = [block.n_kept for block in self.blocks]
        return tuple(layout_widths(self.layout, self.blocks, kept, self.multiple_of))

    @cached_property
    def size(self) -> Size | None:
        """Parameters that the cut takes away; None if the atlas does not say how many a channel has."""
        return size_of(self.blocks, [block.n_kept for block in self.blocks], self.widths)

    @property
    def parameters_after(self) -> int | None:
        """Parameters of the result as written; None if the atlas does not say."""
        return self.parameters - self.size.written if self.parameters and self.size else None

    @cached_property
    def sizes(self) -> Sizes | None:
        """Parameters, bytes and config before and after the cut; None if the atlas does not say how many parameters go."""
        after = self.parameters_after
        if after is None:
            return None
        sizes = planned_sizes(self.blocks, self.widths, self.parameters, after, self.model_config, self.layout)
        if self.file_bytes is not None:
            return replace(sizes, bytes=(self.file_bytes.before, self.file_bytes.after(self.widths)))
        # The config names the type of a checkpoint, and not those of a GGUF file.
        return replace(sizes, bytes=None) if self.format == GGUF else sizes

    def check_atlas(self, atlas: Atlas) -> None:
        """Raise `AtlasError` if ``atlas`` has another content digest than the atlas that the plan was made from."""
        if atlas.content_sha256 != self.atlas_sha256:
            raise AtlasError(
                f"{atlas.path} is not the atlas of the plan: its content SHA-256 is {atlas.content_sha256[:12]}..., "
                f"and the plan was made from {self.atlas_sha256[:12]}...",
                hint="make the plan again from this atlas",
            )


@dataclass(frozen=True)
class Change:
    """A config field's value before and after; None if the field was unset."""

    before: Any
    after: Any


@dataclass(frozen=True)
class Applied:
    """How a plan's result is laid out, so that the cut can be undone.

    Attributes:
        widths: Name of every FFN to its width in the result: the kept channels, followed by zero channels up to this width.
        config: Config fields that changed, dotted if nested.
        fingerprint: Fingerprint of the checkpoint that was cut.
    """

    widths: dict[str, int]
    config: dict[str, Change]
    fingerprint: str


def make_plan(atlas: Atlas, options: PlanOptions) -> PruningPlan:
    """Decide which channels ``atlas``'s model keeps.

    The channels with the lowest scores go first; of equal scores, the highest index goes first. Protected channels
    never go. If the options name a size, the sparsity is the one whose result is at that size or just below. No model is
    read.

    Raises:
        UsageError: An option is out of range or has no meaning for this model, the protected channels do not fit, or no cut
            reaches the size.
        AtlasError: The atlas is unfinished, or lacks what the method or a selector needs.
    """
    options.check()
    if atlas.status != "complete":
        raise AtlasError(f"{atlas.path} is unfinished", hint="finish it with: atlas build ... --resume")
    if not atlas.blocks:
        raise AtlasError(f"{atlas.path} lists no FFN")
    rule = layout_rule(options.layout, atlas.blocks, read_config(atlas.model.config))
    rule.check()
    if options.format == GGUF and rule.may_be_uneven and options.allocation != "uniform":
        raise uneven_gguf(uniform=False)
    found = None
    if options.to is not None:
        found = sized(atlas, options)
        options = replace(options, sparsity=found.sparsity, to=None)
    decision = decide(atlas, options)
    model, calibration = atlas.model, atlas.calibration
    tokens = calibration.token_ids
    plan = PruningPlan(
        model=PlannedModel(model.id, model.revision, model.source, model.model_type, model.architectures, model.fingerprint),
        method=options.method,
        protection=decision.protection,
        unprotect=tuple(file_name(selector) for selector in options.unprotect),
        protected=decision.protected,
        released=decision.released,
        seed=options.seed,
        sparsity=options.share,
        multiple_of=options.multiple_of,
        allocation=options.allocation,
        max_layer_sparsity=options.max_layer_sparsity,
        layers=options.layers,
        stack=options.stack,
        invert=options.invert,
        scope_channels=sum(math.prod(block.shape) for block in atlas.blocks if block.index in decision.scope),
        atlas_sha256=atlas.content_sha256,
        calibration=_describe_calibration(atlas),
        check_tokens=() if tokens is None or not len(tokens) else tuple(int(token) for token in tokens[0, :CHECK_TOKENS]),
        blocks=tuple(
            _plan_block(atlas, block, name, decision.kept[block.index])
            for block, name in zip(atlas.blocks, _names(atlas.blocks), strict=True)
        ),
        atlas_source=atlas.hub_source,
        parameters=model.parameters,
        warnings=decision.warnings,
        sized=found,
        evidence=decision.evidence,
        model_config=read_config(model.config),
        format=options.format,
        file_bytes=options.file_bytes,
    )
    kept = [block.n_kept for block in plan.blocks]
    layout, widths = rule.widths(plan.blocks, kept, options.multiple_of)
    if options.format == GGUF and needs_code(layout):
        raise uneven_gguf(uniform=options.allocation == "uniform")
    notes = layout_notes(layout, rule, kept, widths)
    return replace(plan, layout=layout, warnings=(*plan.warnings, *notes, *width_warnings(plan.blocks, widths)))


def layer_rows(plan: PruningPlan) -> tuple[list[str], list[list[str]]]:
    """Headings and one row per FFN. The widths of an FFN with experts are those of each expert."""
    headings = ["layer", "module", "channels", "kept", "supernodes removed", "LP kept"]
    rows = []
    for block in plan.blocks:
        experts = f"{block.n_experts} x " if block.n_experts else ""
        rows.append(
            [
                str(block.layer_index),
                block.module,
                f"{experts}{block.n_channels:,}",
                f"{experts}{block.n_kept:,}",
                f"{block.supernodes - block.supernodes_kept:,} of {block.supernodes:,}",
                percent(block.lp_kept),
            ]
        )
    return headings, rows


def percent(share: float | None) -> str:
    """``share`` as a percentage with one decimal, for a table's cell; ``-`` if it is unknown."""
    return "-" if share is None else f"{share:.1%}"


def _describe_calibration(atlas: Atlas) -> str:
    record = atlas.calibration
    sources = sorted({contribution.source for contribution in record.contributions})
    return f"{', '.join(sources)}, {record.sequences} x {record.seq_len} tokens{record.ends_note}"


def _names(blocks: Sequence[Block]) -> list[str]:
    """A name for every FFN: its module, with its number if another FFN has the same module."""
    modules = Counter(block.module for block in blocks)
    return [block.module if modules[block.module] == 1 else f"{block.module}#{block.index}" for block in blocks]


def _plan_block(atlas: Atlas, block: Block, name: str, kept: np.ndarray) -> BlockPlan:
    stack = atlas.stacks[block.stack]
    core = stack.row("label", block.row) == schema.LABEL_SUPERNODE
    return BlockPlan(
        name,
        block.layer_index,
        block.place,
        block.module,
        block.stack,
        block.n_channels,
        block.n_experts,
        tuple(block.tensors),
        np.nonzero(kept)[-1].reshape(*kept.shape[:-1], -1).astype(np.int32),
        int(core.sum()),
        int((core & kept).sum()),
        _lp_kept(stack, block, kept),
        block.width_field,
        block.width_factor,
        block.channel_parameters,
    )


def _lp_kept(stack: Stack, block: Block, kept: np.ndarray) -> float | None:
    """Share of the FFN's LP in its kept channels, each expert weighted by its tokens; None if the LP is unknown or 0."""
    if "lp" not in stack:
        return None
    mass = lp_mass(stack, block)
    total = float(mass.sum())
    return float(mass[kept].sum()) / total if total > 0 else None
