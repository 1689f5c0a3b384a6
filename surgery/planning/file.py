"""Plan files (spec/plan-1.md): a plan as one safetensors file.

Its ``__metadata__`` holds ``format`` and ``plan``, the plan as JSON. Its tensors are the ids of the kept channels,
ascending I32, one tensor per FFN. The copy that travels with a result also holds ``applied``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from chanfmt.base.errors import ChanfmtError, UsageError
from chanfmt.base.files import atomic_file
from chanfmt.base.parsed import parse_json
from chanfmt.format.records import Block, widths_complaint
from chanfmt.models.safetensors import read_header
from surgery.planning.decide import SelectorEffect  # noqa: TC001 (msgspec reads the annotations)
from surgery.planning.layouts import UNIFORM, WRITTEN
from surgery.planning.plan import CHECK_TOKENS, Applied, BlockPlan, Change, PlannedModel, PruningPlan

if TYPE_CHECKING:
    from pathlib import Path

_KEPT_FILE = "kept_channels.safetensors"
PLAN_FORMAT = "pruning-plan/1"


class _StoredBlock(msgspec.Struct):
    """An object of ``blocks``. `BlockPlan` has the same fields, and ``kept``."""

    name: str
    layer_index: int
    place: str
    module: str
    stack: str
    n_channels: int
    n_experts: int
    tensors: msgspec.Raw
    supernodes: int
    supernodes_kept: int
    lp_kept: float | None
    width_field: str | None = None
    width_factor: int = 0
    channel_parameters: int = 0


class _StoredPlan(msgspec.Struct):
    """The object ``plan``. `PruningPlan` has the same fields, and ``warnings``."""

    model: PlannedModel
    method: str
    protected: int
    released: int
    seed: int
    sparsity: float
    multiple_of: int | None
    allocation: str
    max_layer_sparsity: float | None
    layers: str | None
    invert: bool
    scope_channels: int
    atlas_sha256: str
    atlas_source: str
    calibration: str
    unprotect: tuple[str, ...]
    stack: tuple[str, ...]
    check_tokens: tuple[int, ...]
    protection: tuple[SelectorEffect, ...]
    blocks: list[_StoredBlock]
    extra: list[_StoredBlock] = []
    parameters: int = 0
    layout: str = UNIFORM


class _StoredApplied(msgspec.Struct):
    """The object ``applied``, as `Applied`."""

    widths: dict[str, int]
    config: dict[str, Change]
    fingerprint: str


_PLAIN = tuple(name for name in _StoredPlan.__struct_fields__ if name not in ("model", "protection", "blocks", "extra"))
_PLAIN_OF_BLOCK = tuple(name for name in _StoredBlock.__struct_fields__ if name != "tensors")


def save_plan(plan: PruningPlan, path: Path, *, overwrite: bool = True) -> None:
    """Write ``plan`` to ``path``, whole or not at all.

    Args:
        overwrite: Whether a file that is there is replaced.

    Raises:
        OutputAppearedError: ``path`` exists, and ``overwrite`` is False. The plan is kept beside it.
        ChanfmtError: The file cannot be written.
    """
    with atomic_file(path, overwrite=overwrite) as temporary:
        write_plan(plan, temporary)


def write_plan(plan: PruningPlan, path: Path, applied: Applied | None = None) -> None:
    """Write ``plan`` to ``path`` directly, for a caller that publishes a whole directory.

    Args:
        applied: How the plan's result is laid out, for the copy that travels with a result.
    """
    from safetensors.numpy import save

    value = {
        "model": asdict(plan.model),
        **{name: getattr(plan, name) for name in _PLAIN},
        "protection": [asdict(effect) for effect in plan.protection],
        "blocks": [_described(block) for block in plan.blocks],
        **({"extra": [_described(block) for block in plan.extra]} if plan.extra else {}),
    }
    metadata = {"format": PLAN_FORMAT, "plan": json.dumps(value, separators=(",", ":"), allow_nan=False)}
    if applied is not None:
        metadata["applied"] = json.dumps(asdict(applied), separators=(",", ":"), allow_nan=False)
    path.write_bytes(save({block.name: block.kept.astype("<i4") for block in (*plan.blocks, *plan.extra)}, metadata))


def _described(block: BlockPlan) -> dict[str, Any]:
    """The object of ``blocks`` that describes ``block``."""
    return {name: getattr(block, name) for name in _PLAIN_OF_BLOCK} | {"tensors": [asdict(tensor) for tensor in block.tensors]}


def load_plan(path: Path) -> PruningPlan:
    """Read a plan file. Nothing in the file is trusted.

    Raises:
        UsageError: The file is missing, damaged, or not a plan.
    """
    return _load(path)[0]


def load_applied(path: Path) -> tuple[PruningPlan, Applied]:
    """Read the copy of a plan that travels with its result. Nothing in the file is trusted.

    Raises:
        UsageError: The file is missing, damaged, not a plan, or does not say how the plan was applied.
    """
    if path.parent.is_dir() and not path.exists():
        raise UsageError(
            f"{path.parent} is not a result of surgery: it has no {path.name}",
            hint="name the directory of a result of surgery prune or apply",
        )
    plan, applied = _load(path)
    if applied is None:
        raise UsageError(
            f"{path} is a plan that was not applied", hint="name the directory of a result of surgery prune or apply"
        )
    return plan, applied


def _load(path: Path) -> tuple[PruningPlan, Applied | None]:
    if not path.exists():
        raise UsageError(f"the plan {path} does not exist", hint="make one with: surgery plan ATLAS --sparsity S -o PLAN")
    if path.is_dir():
        raise UsageError(f"{path} is a directory, not a plan", hint=f"the plan of a result is {path / _KEPT_FILE}")
    if path.suffix in (".h5", ".hdf5"):
        raise UsageError(
            f"{path} is not a pruning plan; it seems to be an atlas", hint="cut by an atlas with: surgery prune ATLAS"
        )
    try:
        entries, metadata = read_header(path)
        if metadata.get("format") != PLAN_FORMAT:
            raise ValueError(f"its format is not {PLAN_FORMAT}")
        kept = {}
        for name, entry in entries.items():
            if entry.dtype != "I32" or len(entry.shape) not in (1, 2):
                raise ValueError(f"{name!r} is not a list of channel ids, nor one list per expert")
            ids = np.fromfile(path, dtype="<i4", count=entry.elements, offset=entry.start)
            kept[name] = ids.reshape(entry.shape).astype(np.int32)
        plan = _plan(parse_json(metadata.get("plan", ""), _StoredPlan), kept)
        return plan, _applied(parse_json(metadata["applied"], _StoredApplied), plan) if "applied" in metadata else None
    except ChanfmtError as error:
        raise UsageError(f"{path} is not a pruning plan: {error.message}", hint=error.hint) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a pruning plan: {error}") from None


def _plan(stored: _StoredPlan, kept: dict[str, np.ndarray]) -> PruningPlan:
    """A plan from its JSON and its tensors. Raises ValueError or `ChanfmtError`."""
    names = [block.name for block in (*stored.blocks, *stored.extra)]
    if not stored.blocks or set(names) != kept.keys() or len(names) != len(kept):
        raise ValueError("its FFNs and its tensors do not match")
    if stored.scope_channels < 1:
        raise ValueError("scope_channels is not a number of channels")
    values = {item.name: getattr(stored, item.name) for item in fields(PruningPlan) if item.name in _StoredPlan.__struct_fields__}
    complaint = widths_complaint(
        [block.n_channels for block in stored.blocks],
        [block.width_field or "" for block in stored.blocks],
        [block.width_factor for block in stored.blocks],
        None,
    )
    if complaint or stored.parameters < 0 or any(block.channel_parameters < 0 for block in stored.blocks):
        raise ValueError(complaint or "a number of parameters is negative")
    if stored.layout not in WRITTEN:
        raise ValueError(f"it asks for the layout {stored.layout!r}, which this version does not know")
    values["check_tokens"] = stored.check_tokens[:CHECK_TOKENS]
    values["blocks"] = tuple(_block(block, kept[block.name]) for block in stored.blocks)
    values["extra"] = tuple(_block(block, kept[block.name]) for block in stored.extra)
    return PruningPlan(**values)


def _block(stored: _StoredBlock, ids: np.ndarray) -> BlockPlan:
    name, width, experts = stored.name, stored.n_channels, stored.n_experts
    if ids.shape[:-1] != ((experts,) if experts else ()):
        raise ValueError(f"the kept channels of {name!r} are not those of {experts or 'no'} experts")
    if not ids.size or ids.min() < 0 or ids.max() >= width or (np.diff(ids) <= 0).any():
        raise ValueError(f"the kept channels of {name!r} are not ascending ids below {width}")
    values: dict[str, Any] = {field: getattr(stored, field) for field in _PLAIN_OF_BLOCK}
    return BlockPlan(**values, kept=ids, tensors=Block.tensors_from_json(bytes(stored.tensors).decode()))


def _applied(stored: _StoredApplied, plan: PruningPlan) -> Applied:
    blocks = (*plan.blocks, *plan.extra)
    missing = [block.name for block in blocks if block.name not in stored.widths]
    if missing:
        raise ValueError(f"widths lacks {missing[0]!r}")
    widths = {block.name: stored.widths[block.name] for block in blocks}
    if any(not block.n_kept <= widths[block.name] <= block.n_channels for block in blocks):
        raise ValueError("widths has a width below the kept or above the old width of its FFN")
    return Applied(widths, stored.config, stored.fingerprint)
