"""Layers in the files that stock transformers does not load and a server does: multi-token prediction, draft heads, towers.

The config field of an FFN's width holds for such a layer too. A cut must not leave the layer at another width than its
config says. It is cut along, dropped together with its config field, or the cut is refused.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.errors import ModelError
from chanfmt.models.stored.weights import StoredWeights
from surgery.cut.checkpoint.cuts import plan_cuts
from surgery.cut.config_width import config_fields, edit_config
from surgery.planning.plan import BlockPlan, Change

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chanfmt.models.accounting import Accounting
    from chanfmt.models.safetensors import CheckpointIndex
    from surgery.cut.config_width import Layout
    from surgery.planning.plan import PruningPlan

_COUNT = re.compile(r"(^|_)(mtp|nextn)(_|$)")
_WAYS_OUT = (
    "add --extra-layers cut to narrow them too (by the norms of their own weights, because nothing was measured), or "
    "--extra-layers drop to leave them out"
)


@dataclass(frozen=True)
class ExtraLayers:
    """What became of the layers that stock transformers does not load.

    Attributes:
        choice: A key of `surgery.cut.options.EXTRA_LAYERS`.
        layers: Prefixes of their tensors, such as ``mtp.layers.0``.
        tensors: Number of their tensors that were cut or dropped.
    """

    choice: str
    layers: tuple[str, ...]
    tensors: int

    def to_json(self) -> dict[str, Any]:
        """The object ``extra_layers`` of ``surgery.json``."""
        return asdict(self) | {"kept_by": "magnitude" if self.choice == "cut" else None}

    def summary(self) -> str:
        """One line for people."""
        where = ", ".join(self.layers[:3]) + (f" and {len(self.layers) - 3} more" if len(self.layers) > 3 else "")
        if self.choice == "drop":
            return f"{where}: dropped, {self.tensors:,} tensors (stock transformers does not load them)"
        return (
            f"{where}: {self.tensors:,} tensors cut by the norms of their weights (not measured: stock transformers ignores them)"
        )


@dataclass(frozen=True, eq=False)
class Handled:
    """A cut that leaves no extra layer at another width.

    Attributes:
        plan: The plan, with the FFNs of extra layers that are cut along.
        layout: The layout, with their cuts, or with the config fields of the dropped layers.
        dropped: Names of tensors that are left out.
        record: What was done; None if there is nothing to do.
    """

    plan: PruningPlan
    layout: Layout
    dropped: frozenset[str] = frozenset()
    record: ExtraLayers | None = None


def handle_extra_layers(
    plan: PruningPlan, layout: Layout, index: CheckpointIndex, accounting: Accounting, choice: str | None
) -> Handled:
    """Cut or drop the layers that stock transformers does not load, as ``choice`` says.

    Args:
        layout: The layout of the cut without them.
        accounting: What the stock class loads of ``index``.
        choice: A key of `surgery.cut.options.EXTRA_LAYERS`; None to refuse a cut that they would contradict.

    Raises:
        ModelError: An FFN of an extra layer has the width that the cut changes, and ``choice`` is None, or the FFN cannot be
            followed.
    """
    outside = _outside(index, accounting)
    found = list(_extra_ffns(plan, layout, index, outside)) if outside else []
    claimed = {item.tensor for _, _, block in found for item in block.tensors}
    # Another class of the model type loads these. It may have a width field of its own for them.
    heads = {name for group in accounting.unloaded if group.head for name in group.tensors}
    unclear = [*sorted(claimed & heads), *_unclear(plan, layout, index, outside - claimed - heads, accounting)]
    if choice == "drop":
        return _dropped(plan, layout, index, accounting, claimed | set(unclear))
    if unclear:
        raise ModelError(
            f"the tensor {unclear[0]!r}, which stock transformers does not load, has a width that this cut changes, and "
            "nothing tells which of its axes holds channels",
            hint="add --extra-layers drop to leave such layers out",
        )
    if found and choice is None:
        raise ModelError(
            f"{found[0][1]} has FFNs of a width that this cut changes, and stock transformers does not load it: config.json "
            "would name one width, and the files would hold two",
            hint=_WAYS_OUT,
        )
    if not found:
        return Handled(plan, layout)
    weights = StoredWeights(index, "float32")
    blocks = tuple(replace(block, kept=_by_magnitude(weights, block, width)) for width, _, block in found)
    widths = {block.name: block.n_kept for block in blocks}
    cuts = plan_cuts(replace(plan, blocks=blocks), widths, index)
    return Handled(
        replace(plan, extra=blocks),
        replace(layout, widths=layout.widths | widths, cuts=layout.cuts | cuts),
        record=ExtraLayers("cut", tuple(dict.fromkeys(stem for _, stem, _ in found)), len(cuts)),
    )


def without(index: CheckpointIndex, dropped: frozenset[str]) -> CheckpointIndex:
    """``index`` without the tensors ``dropped``."""
    if not dropped:
        return index
    return replace(index, tensors={name: entry for name, entry in index.tensors.items() if name not in dropped})


def _outside(index: CheckpointIndex, accounting: Accounting) -> set[str]:
    """Tensors that the class does not load."""
    return set(index.tensors) - set(accounting.loaded)


def _extra_ffns(
    plan: PruningPlan, layout: Layout, index: CheckpointIndex, outside: set[str]
) -> Iterator[tuple[int, str, BlockPlan]]:
    """Every FFN outside the model whose tensors end like those of an FFN of the plan and have their shapes.

    Yields:
        The width that it must get, the prefix of its tensors, and the FFN with all its channels.
    """
    seen: dict[str, tuple[int, BlockPlan]] = {}
    for block in plan.blocks:
        width, prefix = layout.widths[block.name], _layer_of(block.tensors[0].tensor)
        if width == block.n_channels or not all(item.tensor.startswith(prefix) for item in block.tensors):
            continue
        first = block.tensors[0].tensor.removeprefix(prefix)
        for name in sorted(outside):
            stem = name.removesuffix(first)
            if stem == name:
                continue
            tensors = tuple(
                replace(item, tensor=stem + item.tensor.removeprefix(prefix), parameter=stem + item.tensor.removeprefix(prefix))
                for item in block.tensors
            )
            alike = all(
                moved.tensor in outside and index.tensors[moved.tensor].shape == index.tensors[item.tensor].shape
                for moved, item in zip(tensors, block.tensors, strict=True)
            )
            if not alike:
                continue
            module = stem + block.module.removeprefix(_layer_of(block.module)) if "." in block.module else stem
            before = seen.get(name)
            if before is not None:
                if before[0] != width:
                    raise ModelError(
                        f"{module} is like FFNs of several new widths, {before[0]} and {width}, so its own width is unknown",
                        hint="add --extra-layers drop to leave it out, or use --allocation uniform",
                    )
                continue
            # Two FFNs of one layer may have the same module.
            taken = {other.name for _, other in seen.values()}
            extra = BlockPlan(
                module if module not in taken else f"{module}#{len(seen)}",
                block.layer_index,
                "other",
                module,
                block.stack,
                block.n_channels,
                block.n_experts,
                tensors,
                np.empty(0, dtype=np.int32),
                0,
                0,
                None,
            )
            seen[name] = (width, extra)
            yield width, stem, extra


def _unclear(plan: PruningPlan, layout: Layout, index: CheckpointIndex, outside: set[str], accounting: Accounting) -> list[str]:
    """Matrices outside the model that have both sizes of a matrix that is cut, and that no loaded tensor explains."""
    if not outside:
        return []
    sizes = {tuple(sorted(index.tensors[name].shape[-2:])) for name in layout.cuts if len(index.tensors[name].shape) > 1}
    planned = {item.tensor for block in plan.blocks for item in block.tensors}
    known = {(_rest_of(name), index.tensors[name].shape) for name in accounting.loaded if name not in planned}
    return sorted(
        name
        for name in outside
        if 2 <= len(index.tensors[name].shape) <= 3
        and tuple(sorted(index.tensors[name].shape[-2:])) in sizes
        and (_rest_of(name), index.tensors[name].shape) not in known
    )


def _dropped(plan: PruningPlan, layout: Layout, index: CheckpointIndex, accounting: Accounting, conflicting: set[str]) -> Handled:
    groups = [group for group in accounting.unloaded if not group.head or conflicting & set(group.tensors)]
    dropped = frozenset(name for group in groups for name in group.tensors)
    if not dropped:
        return Handled(plan, layout)
    counts = {path: value for path, value in config_fields(layout.config) if _is_count(path[-1], value)}
    config = edit_config(layout.config, dict.fromkeys(counts, 0))
    switched = {".".join(path): Change(value, 0) for path, value in counts.items()}
    return Handled(
        plan,
        replace(layout, config=config, switched=dict(layout.switched) | switched),
        dropped,
        ExtraLayers("drop", tuple(group.prefix for group in groups), len(dropped)),
    )


def _is_count(name: str, value: Any) -> bool:
    """Whether a config field holds a number of layers for multi-token prediction."""
    return type(value) is int and value > 0 and bool(_COUNT.search(name)) and ("num" in name or "layers" in name)


def _by_magnitude(weights: StoredWeights, block: BlockPlan, width: int) -> np.ndarray:
    """The ``width`` channels of each expert with the largest sum of L2 norms of write, up and gate, ascending, int32.

    This is the method ``magnitude`` of `surgery.planning.methods`.
    """
    lines = []
    for expert in range(max(1, block.n_experts)):
        ffn = weights.ffn(block, expert)  # type: ignore[arg-type]
        score = np.linalg.norm(ffn.write.astype(np.float64), axis=0)
        for read in ffn.reads:
            score = score + np.linalg.norm(read.astype(np.float64), axis=1)
        # Ties go to the lowest index.
        lines.append(np.sort(np.argsort(-score, kind="stable")[:width]).astype(np.int32))
    return np.stack(lines) if block.n_experts else lines[0]


def _layer_of(name: str) -> str:
    """``name`` up to its first number, such as ``model.layers.3``; up to its last dot if it has no number."""
    parts = name.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: at + 1])


def _rest_of(name: str) -> str:
    return name.removeprefix(_layer_of(name))
