"""What a cut will do, as data: which channels every FFN keeps. No torch, no model.

A plan file (spec/plan-1.md) is one safetensors file. Its ``__metadata__`` holds ``format`` and ``plan``,
the plan as JSON; its tensors are the kept channel ids, ascending I32, one tensor per FFN.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.errors import AtlasError, ChanfmtError, UsageError
from chanfmt.base.files import atomic_file
from chanfmt.base.typed import list_of, typed
from chanfmt.format import schema
from chanfmt.format.records import Block, TensorSlice
from chanfmt.models.safetensors import read_header
from surgery.planning.choice import MAX_LAYER_SPARSITY
from surgery.planning.decide import ALLOCATIONS, SelectorEffect, decide
from surgery.planning.mass import lp_mass
from surgery.planning.methods import METHODS, find_method
from surgery.planning.selectors import SYNTAX, file_name
from surgery.planning.width import check_sparsity

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from chanfmt.format.reader import Atlas, Stack

PLAN_FORMAT = "pruning-plan/1"
CHECK_TOKENS = 128
"""Tokens of the atlas's first sequence that a plan carries, so that its result can be checked."""


@dataclass(frozen=True)
class PlanOptions:
    """What to cut."""

    sparsity: float = field(metadata={"help": "share of the FFN channels to remove, such as 0.5", "metavar": "S"})
    method: str = field(
        default="scar-prot",
        metadata={"help": f"score that ranks channels: {', '.join(METHODS)}", "metavar": "METHOD"},
    )
    protect: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": f"channels that are never removed; repeat for their union: {SYNTAX.replace('%', '%%')}",
            "metavar": "WHAT",
            "repeat": True,
        },
    )
    unprotect: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "channels to take out of what --protect and the method protect, written likewise; repeat for more",
            "metavar": "WHAT",
            "repeat": True,
        },
    )
    allocation: str = field(
        default="uniform",
        metadata={
            "help": "uniform: the same share of every FFN; global: the lowest scores of all FFNs together",
            "choices": ALLOCATIONS,
        },
    )
    max_layer_sparsity: float | None = field(
        default=None,
        metadata={
            "help": f"share of an FFN that --allocation global removes at most (default: {MAX_LAYER_SPARSITY})",
            "metavar": "S",
        },
    )
    layers: str | None = field(
        default=None,
        metadata={
            "help": "cut these layers only, such as 0-7,12; the others keep every channel",
            "metavar": "LAYERS",
        },
    )
    stack: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "cut the FFNs of this stack only; repeat for more",
            "metavar": "NAME",
            "repeat": True,
        },
    )
    invert: bool = field(
        default=False,
        metadata={
            "help": "keep exactly what would be removed, and remove what would be kept",
        },
    )
    multiple_of: int | None = field(
        default=None,
        metadata={
            "help": "round kept widths to a multiple of N (default: up to 256, where that moves them by less than 2%%)",
            "metavar": "N",
        },
    )
    seed: int = field(default=0, metadata={"help": "seed of the method random"})

    def check(self) -> None:
        """Raise `UsageError` for a value outside its range."""
        check_sparsity(self.sparsity)
        find_method(self.method)
        if self.seed < 0:
            raise UsageError(f"--seed must not be negative, not {self.seed}")
        if self.multiple_of is not None and self.multiple_of < 1:
            raise UsageError(f"--multiple-of must be at least 1, not {self.multiple_of}")
        if self.allocation not in ALLOCATIONS:
            raise UsageError(f"there is no allocation {self.allocation!r}", hint=f"allocations: {', '.join(ALLOCATIONS)}")
        if self.max_layer_sparsity is None:
            return
        if self.allocation == "uniform":
            raise UsageError(
                "--max-layer-sparsity means nothing where all FFNs lose the same share", hint="add --allocation global"
            )
        if not 0 < self.max_layer_sparsity <= 1:
            raise UsageError(f"--max-layer-sparsity must lie above 0 and at most 1, not {self.max_layer_sparsity:g}")


@dataclass(frozen=True)
class PlannedModel:
    """The model a plan is for, as its atlas names it."""

    id: str
    revision: str
    source: str
    model_type: str
    architectures: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """What one FFN keeps.

    Attributes:
        name: What the plan file calls it: its module, with a number where another FFN has the same one.
        layer_index, place, module, stack, n_channels, n_experts, tensors: As in `chanfmt.format.records.Block`.
        kept: Ids of the channels that stay, ascending, int32: (kept,), or (expert, kept) where it has experts.
        supernodes, supernodes_kept: Supernodes before and after.
        lp_kept: Share of the FFN's LP that its kept channels hold; None where LP is unknown or 0.
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

    @property
    def n_kept(self) -> int:
        """Channels that stay, of each expert where it has experts."""
        return int(self.kept.shape[-1])

    @property
    def is_cut(self) -> bool:
        """Whether any channel goes."""
        return self.n_kept < self.n_channels

    def kept_of(self, expert: int) -> np.ndarray:
        """Ascending ids of the channels that stay in expert number ``expert`` (0 where it is dense), int32."""
        return self.kept[expert] if self.n_experts else self.kept

    def removed_of(self, expert: int) -> np.ndarray:
        """Ascending ids of the channels that go from expert number ``expert`` (0 where it is dense), int32."""
        mask = np.ones(self.n_channels, dtype=bool)
        mask[self.kept_of(expert)] = False
        return np.flatnonzero(mask).astype(np.int32)


@dataclass(frozen=True, eq=False)
class PruningPlan:
    """Which channels every FFN of a model keeps, and why.

    Attributes:
        model: The model it is for; its fingerprint decides whether a checkpoint is that model.
        method, seed, sparsity, multiple_of, allocation, max_layer_sparsity, layers, stack, invert: What was asked, as
            in `PlanOptions`; ``layers`` None and ``stack`` empty are all.
        protection: What each selector of ``--protect`` and of the method did, before any inversion.
        unprotect: The selectors that were taken out of protection.
        protected, released: Channels that were protected, in all FFNs, and that ``unprotect`` kept from it.
        scope_channels: Channels of the FFNs that could be cut.
        atlas_sha256: ``content_sha256`` of the atlas.
        atlas_source: Which file of which commit on the Hub the atlas was; empty for a local file.
        calibration: What the atlas was measured on, for people.
        check_tokens: Token ids to compare logits on; empty where the atlas stores none.
        blocks: One `BlockPlan` per FFN, in model order.
        warnings: What the user should know; not part of the file.
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
    warnings: tuple[str, ...] = ()

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
        """Channels of all FFNs after it."""
        return sum(block.kept.size for block in self.blocks)

    @property
    def sparsity_reached(self) -> float:
        """Share of all channels that the plan removes."""
        return 1 - self.channels_kept / self.channels

    @property
    def scope_sparsity_reached(self) -> float:
        """Share that it removes of the channels of the FFNs that could be cut."""
        return (self.channels - self.channels_kept) / self.scope_channels


@dataclass(frozen=True)
class Change:
    """A config field's value before and after; None where it was unset."""

    before: Any
    after: Any


@dataclass(frozen=True)
class Applied:
    """How a plan's result was laid out, so that it can be undone.

    Attributes:
        widths: Name of every FFN to its width in the result: what it keeps, and zero channels up to that.
        config: Config fields that changed, dotted where nested.
        fingerprint: Of the checkpoint that was cut.
    """

    widths: dict[str, int]
    config: dict[str, Change]
    fingerprint: str


def make_plan(atlas: Atlas, options: PlanOptions) -> PruningPlan:
    """Decide what ``atlas``'s model keeps.

    The lowest scores go first, of equal ones the highest index; protected channels never go.

    Raises:
        UsageError: An option cannot mean anything, or the protected channels do not fit.
        AtlasError: The atlas is unfinished, or lacks what the method needs.
    """
    options.check()
    if atlas.status != "complete":
        raise AtlasError(f"{atlas.path} is unfinished", hint="finish it with: atlas build ... --resume")
    if not atlas.blocks:
        raise AtlasError(f"{atlas.path} lists no FFN")
    decision = decide(atlas, options)
    model, calibration = atlas.model, atlas.calibration
    tokens = calibration.token_ids
    return PruningPlan(
        model=PlannedModel(model.id, model.revision, model.source, model.model_type, model.architectures, model.fingerprint),
        method=options.method,
        protection=decision.protection,
        unprotect=tuple(file_name(selector) for selector in options.unprotect),
        protected=decision.protected,
        released=decision.released,
        seed=options.seed,
        sparsity=options.sparsity,
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
        warnings=decision.warnings,
    )


def save_plan(plan: PruningPlan, path: Path) -> None:
    """Write ``plan`` to ``path``, whole or not at all.

    Raises:
        ChanfmtError: The place cannot be written.
    """
    with atomic_file(path) as temporary:
        write_plan(plan, temporary)


def write_plan(plan: PruningPlan, path: Path, applied: Applied | None = None) -> None:
    """Write ``plan`` to ``path`` as it is, for a caller that publishes a whole directory.

    Args:
        applied: How its result was laid out, where this copy travels with one.
    """
    from safetensors.numpy import save

    value = {
        "model": asdict(plan.model),
        **{name: getattr(plan, name) for name in (*_SCALARS, *_LISTS)},
        "protection": [asdict(effect) for effect in plan.protection],
        "blocks": [
            {name: getattr(block, name) for name in _BLOCK_FIELDS} | {"tensors": [asdict(tensor) for tensor in block.tensors]}
            for block in plan.blocks
        ],
    }
    metadata = {"format": PLAN_FORMAT, "plan": json.dumps(value, separators=(",", ":"), allow_nan=False)}
    if applied is not None:
        metadata["applied"] = json.dumps(asdict(applied), separators=(",", ":"), allow_nan=False)
    path.write_bytes(save({block.name: block.kept.astype("<i4") for block in plan.blocks}, metadata))


def load_plan(path: Path) -> PruningPlan:
    """Read a plan file. Nothing in it is trusted.

    Raises:
        UsageError: The file is missing, damaged, or no plan.
    """
    return _load(path)[0]


def load_applied(path: Path) -> tuple[PruningPlan, Applied]:
    """Read the copy of a plan that travels with its result. Nothing in it is trusted.

    Raises:
        UsageError: The file is missing, damaged, no plan, or does not say how it was applied.
    """
    plan, applied = _load(path)
    if applied is None:
        raise UsageError(f"{path} is a plan that was not applied")
    return plan, applied


def _load(path: Path) -> tuple[PruningPlan, Applied | None]:
    try:
        entries, metadata = read_header(path)
        if metadata.get("format") != PLAN_FORMAT:
            raise ValueError(f"its format is not {PLAN_FORMAT}")
        value = json.loads(metadata["plan"])
        kept = {}
        for name, entry in entries.items():
            if entry.dtype != "I32" or len(entry.shape) not in (1, 2):
                raise ValueError(f"{name!r} is not a list of channel ids, nor one per expert")
            ids = np.fromfile(path, dtype="<i4", count=entry.elements, offset=entry.start)
            kept[name] = ids.reshape(entry.shape).astype(np.int32)
        plan = _parse(value, kept)
        return plan, _parse_applied(json.loads(metadata["applied"]), plan) if "applied" in metadata else None
    except ChanfmtError as error:
        raise UsageError(f"{path} is not a pruning plan: {error.message}", hint=error.hint) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{path} is not a pruning plan: {error}") from None


_SCALARS: dict[str, Any] = {
    "method": str,
    "protected": int,
    "released": int,
    "seed": int,
    "sparsity": float,
    "multiple_of": int | None,
    "allocation": str,
    "max_layer_sparsity": float | None,
    "layers": str | None,
    "invert": bool,
    "scope_channels": int,
    "atlas_sha256": str,
    "atlas_source": str,
    "calibration": str,
}
_LISTS: dict[str, type] = {"unprotect": str, "stack": str, "check_tokens": int}
_EFFECT_FIELDS: dict[str, Any] = {"selector": str, "selected": int, "new": int, "safe": int, "cost": int}
_BLOCK_FIELDS: dict[str, Any] = {
    "name": str,
    "layer_index": int,
    "place": str,
    "module": str,
    "stack": str,
    "n_channels": int,
    "n_experts": int,
    "supernodes": int,
    "supernodes_kept": int,
    "lp_kept": float | None,
}
_MODEL_TEXTS = ("id", "revision", "source", "model_type", "fingerprint")


def _parse(value: Any, kept: dict[str, np.ndarray]) -> PruningPlan:
    """A plan from its JSON and its tensors. Raises ValueError, KeyError, TypeError or `ChanfmtError`."""
    blocks = tuple(_parse_block(item, kept) for item in typed(value["blocks"], list, "blocks"))
    if not blocks or {block.name for block in blocks} != kept.keys() or len(blocks) != len(kept):
        raise ValueError("its FFNs and its tensors do not match")
    model = value["model"]
    if typed(value["scope_channels"], int, "scope_channels") < 1:
        raise ValueError("scope_channels is not a number of channels")
    lists: dict[str, Any] = {name: list_of(value[name], kind, name) for name, kind in _LISTS.items()}
    return PruningPlan(
        model=PlannedModel(
            **{name: typed(model[name], str, name) for name in _MODEL_TEXTS},
            architectures=list_of(model["architectures"], str, "architectures"),
        ),
        **{name: typed(value[name], kind, name) for name, kind in _SCALARS.items()},
        protection=tuple(
            SelectorEffect(**{name: typed(item[name], kind, name) for name, kind in _EFFECT_FIELDS.items()})
            for item in typed(value["protection"], list, "protection")
        ),
        **lists | {"check_tokens": lists["check_tokens"][:CHECK_TOKENS]},
        blocks=blocks,
    )


def _parse_block(item: Any, kept: dict[str, np.ndarray]) -> BlockPlan:
    values = {name: typed(item[name], kind, name) for name, kind in _BLOCK_FIELDS.items()}
    width, experts, ids = values["n_channels"], values["n_experts"], kept[values["name"]]
    if ids.shape[:-1] != ((experts,) if experts else ()):
        raise ValueError(f"the kept channels of {values['name']!r} are not those of {experts or 'no'} experts")
    if not ids.size or ids.min() < 0 or ids.max() >= width or (np.diff(ids) <= 0).any():
        raise ValueError(f"the kept channels of {values['name']!r} are not ascending ids below {width}")
    return BlockPlan(**values, kept=ids, tensors=Block.tensors_from_json(json.dumps(item["tensors"])))


def _parse_applied(value: Any, plan: PruningPlan) -> Applied:
    widths = {block.name: typed(value["widths"][block.name], int, "widths") for block in plan.blocks}
    if any(not block.n_kept <= widths[block.name] <= block.n_channels for block in plan.blocks):
        raise ValueError("a width lies outside what its FFN keeps and had")
    config = {str(name): Change(item["before"], item["after"]) for name, item in typed(value["config"], dict, "config").items()}
    return Applied(widths, config, typed(value["fingerprint"], str, "fingerprint"))


def _describe_calibration(atlas: Atlas) -> str:
    record = atlas.calibration
    sources = sorted({contribution.source for contribution in record.contributions})
    return f"{', '.join(sources)}, {record.sequences} x {record.seq_len} tokens"


def _names(blocks: Sequence[Block]) -> list[str]:
    """A name for every block: its module, and its number where another block has the same module."""
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
    )


def _lp_kept(stack: Stack, block: Block, kept: np.ndarray) -> float | None:
    """Share of the FFN's LP in its kept channels, each expert's weighted by its tokens; None where it is unknown or 0."""
    mass = lp_mass(stack, block)
    total = float(mass.sum())
    return float(mass[kept].sum()) / total if total > 0 else None
