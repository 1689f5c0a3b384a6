"""What a cut will do, as data: which channels every FFN keeps. No torch, no model.

A plan file is one safetensors file. Its ``__metadata__`` holds ``format`` and ``plan``, the plan
as JSON; its tensors are the kept channel ids, ascending I32, one tensor per FFN.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt import schema
from chanfmt.errors import AtlasError, ChanfmtError, UsageError
from chanfmt.files import atomic_file
from chanfmt.labels import top_indices
from chanfmt.models.checkpoint import read_header
from chanfmt.records import Block, TensorSlice
from surgery.methods import METHODS, find_method, score
from surgery.protect import ProtectList, protect_list
from surgery.width import check_sparsity, kept_width

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.atlas import Atlas

PLAN_FORMAT = "pruning-plan/1"
CHECK_TOKENS = 128
"""Tokens of the atlas's first sequence that a plan carries, so that its result can be checked."""


@dataclass(frozen=True)
class PlanOptions:
    """What to cut."""

    sparsity: float = field(metadata={"help": "share of every FFN's channels to remove, such as 0.5", "metavar": "S"})
    method: str = field(
        default="scar-prot",
        metadata={"help": f"score that ranks channels: {', '.join(METHODS)}", "metavar": "METHOD"},
    )
    protect: tuple[str, ...] = field(default=(), metadata={
        "help": "channels that are never removed: supernodes, none, or a protect file; repeat for their union",
        "metavar": "WHAT", "repeat": True,
    })
    multiple_of: int | None = field(default=None, metadata={
        "help": "round kept widths to a multiple of N (default: up to 256, where that moves them by less than 2%%)",
        "metavar": "N",
    })
    seed: int = field(default=0, metadata={"help": "seed of the method random"})

    def check(self) -> None:
        """Raise `UsageError` for a value outside its range."""
        check_sparsity(self.sparsity)
        find_method(self.method)
        if self.seed < 0:
            raise UsageError(f"--seed must not be negative, not {self.seed}")
        if self.multiple_of is not None and self.multiple_of < 1:
            raise UsageError(f"--multiple-of must be at least 1, not {self.multiple_of}")


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
        layer_index, place, module, stack, n_channels, n_experts, tensors: As in `chanfmt.records.Block`.
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
        method, protect, seed, sparsity, multiple_of: What was asked; None is the default multiple.
        protected: Channels that were protected, in all FFNs.
        atlas_sha256: ``content_sha256`` of the atlas.
        calibration: What the atlas was measured on, for people.
        check_tokens: Token ids to compare logits on; empty where the atlas stores none.
        blocks: One `BlockPlan` per FFN, in model order.
        warnings: What the user should know; not part of the file.
    """

    model: PlannedModel
    method: str
    protect: tuple[str, ...]
    seed: int
    sparsity: float
    multiple_of: int | None
    protected: int
    atlas_sha256: str
    calibration: str
    check_tokens: tuple[int, ...]
    blocks: tuple[BlockPlan, ...]
    warnings: tuple[str, ...] = ()

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

    In every FFN the lowest scores go first, of equal ones the highest index; protected channels
    never go.

    Raises:
        UsageError: An option cannot mean anything, or the protected channels do not fit.
        AtlasError: The atlas is unfinished, or lacks what the method needs.
    """
    options.check()
    if atlas.status != "complete":
        raise AtlasError(f"{atlas.path} is unfinished", hint="finish it with: atlas build ... --resume")
    if not atlas.blocks:
        raise AtlasError(f"{atlas.path} lists no FFN")
    selectors = tuple(dict.fromkeys((*find_method(options.method).always_protects, *options.protect)))
    protected = protect_list(selectors, atlas)
    widths = {block.index: kept_width(block.n_channels, options.sparsity, options.multiple_of)
              for block in atlas.blocks}
    _check_room(atlas, protected, widths)
    model, calibration = atlas.model, atlas.calibration
    tokens = calibration.token_ids
    return PruningPlan(
        PlannedModel(model.id, model.revision, model.source, model.model_type, model.architectures, model.fingerprint),
        options.method,
        tuple(_file_name(selector) for selector in selectors),
        options.seed, options.sparsity, options.multiple_of, protected.count, atlas.content_sha256,
        _describe_calibration(atlas),
        () if tokens is None or not len(tokens) else tuple(int(token) for token in tokens[0, :CHECK_TOKENS]),
        tuple(_plan_block(atlas, block, name, options, protected.of(block), widths[block.index])
              for block, name in zip(atlas.blocks, _names(atlas.blocks), strict=True)),
        protected.warnings,
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
        **{name: getattr(plan, name) for name in _SCALARS},
        "protect": plan.protect, "check_tokens": plan.check_tokens,
        "blocks": [
            {name: getattr(block, name) for name in _BLOCK_FIELDS}
            | {"tensors": [asdict(tensor) for tensor in block.tensors]}
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
    "method": str, "seed": int, "sparsity": float, "multiple_of": int | None, "protected": int, "atlas_sha256": str,
    "calibration": str,
}
_BLOCK_FIELDS: dict[str, Any] = {
    "name": str, "layer_index": int, "place": str, "module": str, "stack": str, "n_channels": int, "n_experts": int,
    "supernodes": int, "supernodes_kept": int, "lp_kept": float | None,
}
_MODEL_TEXTS = ("id", "revision", "source", "model_type", "fingerprint")


def _parse(value: Any, kept: dict[str, np.ndarray]) -> PruningPlan:
    """A plan from its JSON and its tensors. Raises ValueError, KeyError, TypeError or `ChanfmtError`."""
    blocks = tuple(_parse_block(item, kept) for item in _typed(value["blocks"], list, "blocks"))
    if not blocks or {block.name for block in blocks} != kept.keys() or len(blocks) != len(kept):
        raise ValueError("its FFNs and its tensors do not match")
    model = value["model"]
    return PruningPlan(
        model=PlannedModel(
            **{name: _typed(model[name], str, name) for name in _MODEL_TEXTS},
            architectures=_list_of(model["architectures"], str, "architectures"),
        ),
        **{name: _typed(value[name], kind, name) for name, kind in _SCALARS.items()},
        protect=_list_of(value["protect"], str, "protect"),
        check_tokens=_list_of(value["check_tokens"], int, "check_tokens")[:CHECK_TOKENS],
        blocks=blocks,
    )


def _parse_block(item: Any, kept: dict[str, np.ndarray]) -> BlockPlan:
    values = {name: _typed(item[name], kind, name) for name, kind in _BLOCK_FIELDS.items()}
    width, experts, ids = values["n_channels"], values["n_experts"], kept[values["name"]]
    if ids.shape[:-1] != ((experts,) if experts else ()):
        raise ValueError(f"the kept channels of {values['name']!r} are not those of {experts or 'no'} experts")
    if not ids.size or ids.min() < 0 or ids.max() >= width or (np.diff(ids) <= 0).any():
        raise ValueError(f"the kept channels of {values['name']!r} are not ascending ids below {width}")
    return BlockPlan(**values, kept=ids, tensors=Block.tensors_from_json(json.dumps(item["tensors"])))


def _parse_applied(value: Any, plan: PruningPlan) -> Applied:
    widths = {block.name: _typed(value["widths"][block.name], int, "widths") for block in plan.blocks}
    if any(not block.n_kept <= widths[block.name] <= block.n_channels for block in plan.blocks):
        raise ValueError("a width lies outside what its FFN keeps and had")
    config = {str(name): Change(item["before"], item["after"])
              for name, item in _typed(value["config"], dict, "config").items()}
    return Applied(widths, config, _typed(value["fingerprint"], str, "fingerprint"))


def _typed(value: Any, kind: Any, name: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{name} is not valid")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is not a number")
    return value


def _list_of(value: Any, kind: type, name: str) -> tuple[Any, ...]:
    return tuple(_typed(item, kind, name) for item in _typed(value, list, name))


def _file_name(selector: str) -> str:
    # A plan travels with the model; directories of this machine should not.
    return Path(selector).name


def _describe_calibration(atlas: Atlas) -> str:
    record = atlas.calibration
    sources = sorted({contribution.source for contribution in record.contributions})
    return f"{', '.join(sources)}, {record.sequences} x {record.seq_len} tokens"


def _check_room(atlas: Atlas, protected: ProtectList, widths: dict[int, int]) -> None:
    excess = {block.index: len(protected.of(block)) - widths[block.index] for block in atlas.blocks}
    short = [block for block in atlas.blocks if excess[block.index] > 0]
    if not short:
        return
    worst = max(short, key=lambda block: excess[block.index])
    others = f", and in {len(short) - 1} more" if len(short) > 1 else ""
    raise UsageError(
        f"the protected channels do not fit: layer {worst.layer_index} protects {len(protected.of(worst))} channels "
        f"and would keep {widths[worst.index]}, {excess[worst.index]} too few{others}",
        hint="lower --sparsity, or protect less",
    )


def _names(blocks: Sequence[Block]) -> list[str]:
    """A name for every block: its module, and its number where another block has the same module."""
    modules = Counter(block.module for block in blocks)
    return [block.module if modules[block.module] == 1 else f"{block.module}#{block.index}" for block in blocks]


def _plan_block(
    atlas: Atlas, block: Block, name: str, options: PlanOptions, protected: np.ndarray, width: int
) -> BlockPlan:
    values = score(options.method, atlas, block, options.seed)
    values[protected] = np.inf
    kept = top_indices(values, width).astype(np.int32)
    stack = atlas.stacks[block.stack]
    core = np.flatnonzero(stack.row("label", block.row) == schema.LABEL_SUPERNODE)
    lp = stack.row("lp", block.row).astype(np.float64)
    total = float(lp.sum())
    return BlockPlan(
        name, block.layer_index, block.place, block.module, block.stack, block.n_channels, block.n_experts,
        tuple(block.tensors), kept, len(core),
        int(np.isin(core, kept).sum()), float(lp[kept].sum()) / total if total > 0 else None,
    )
