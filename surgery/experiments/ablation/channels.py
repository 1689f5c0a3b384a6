"""Does LP predict the cost of a channel? Remove single channels and compare the loss with LP; an atlas can store these losses."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.errors import UsageError
from chanfmt.format.unit import unit_rows
from surgery.experiments.ablation.experiment import Condition, Experiment, masses, selected
from surgery.experiments.ablation.removal import mean_activations
from surgery.planning.addresses import chosen_layers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chanfmt.format.reader import Atlas

KEY = ("layers", "module", "expert", "channel")


@dataclass(frozen=True)
class ChannelOptions:
    """Which channels are removed, one at a time."""

    channels: int = field(
        default=32,
        metadata={
            "help": "channels of each FFN, evenly spaced by their rank in LP; an FFN with experts uses its busiest expert",
            "metavar": "N",
        },
    )
    layers: str | None = field(
        default=None,
        metadata={
            "help": "remove channels of these layers (default: the first, the middle and the last layer)",
            "metavar": "LAYERS",
        },
    )
    select: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "remove these channels, one at a time, in place of evenly spaced ones; as for --protect; repeat for more. "
            "Without --layers, of all layers",
            "metavar": "SELECTOR",
            "repeat": True,
        },
    )
    mean: bool = field(default=False, metadata={"help": "replace each channel by its mean activation, not by 0"})


def plan_channels(atlas: Atlas, options: ChannelOptions) -> Experiment:
    """Plan the experiment ``channels``.

    Raises:
        UsageError: An option has no meaning for this atlas.
    """
    if options.channels < 2 and not options.select:
        raise UsageError(f"--channels must be at least 2, not {options.channels}", hint="a correlation needs several channels")
    layers = chosen_layers(options.layers, atlas)
    chosen, warnings = _selected(options.select, atlas, layers)
    if options.layers is None and not options.select:
        ordered = sorted(layers)
        layers = frozenset({ordered[0], ordered[len(ordered) // 2], ordered[-1]})
    mass = masses(atlas)
    conditions = []
    for block in atlas.blocks:
        if block.layer_index not in layers:
            continue
        rows = unit_rows(mass[block.index])
        busiest = int(np.argmax(atlas.stacks[block.stack].row("tokens", block.row))) if block.n_experts else 0
        for expert in range(len(rows)) if options.select else (busiest,):
            order = np.argsort(-rows[expert], kind="stable")
            if options.select:
                ranks = np.flatnonzero(unit_rows(chosen[block.index])[expert][order])
            else:
                ranks = np.unique(np.linspace(0, len(order) - 1, min(options.channels, len(order))).round().astype(int))
            for rank in ranks:
                channel = int(order[rank])
                removed = np.zeros(block.shape, dtype=bool)
                unit_rows(removed)[expert, channel] = True
                key = (str(block.layer_index), block.module, expert if block.n_experts else None, channel)
                extra = {"rank": int(rank) + 1, "lp": float(rows[expert, channel])}
                conditions.append(Condition(dict(zip(KEY, key, strict=True)), {block.index: removed}, extra=extra))
    return Experiment(
        "channels",
        KEY,
        KEY,
        tuple(conditions),
        # None is also what directories hold whose rows are older than the option.
        {"mean": options.mean or None},
        means=mean_activations(atlas) if options.mean else None,
        extra=("rank", "lp"),
        concluded=("ratio", "chance"),
        conclude=_against_lp,
        summarise=_summarise,
        warnings=warnings,
    )


def _selected(selectors: Sequence[str], atlas: Atlas, layers: frozenset[int]) -> tuple[dict[int, np.ndarray], tuple[str, ...]]:
    """The union of ``selectors``: block index to a mask, bool of `Block.shape`; and warnings."""
    masks = {block.index: np.zeros(block.shape, dtype=bool) for block in atlas.blocks}
    warnings: list[str] = []
    for selector in selectors:
        _, found, notes = selected(selector, atlas, layers)
        warnings += notes
        for index, mask in found.items():
            masks[index] |= mask
    return masks, tuple(warnings)


def _against_lp(row: Mapping[str, Any]) -> dict[str, Any]:
    """Measured loss divided by LP, which is 1 if LP is what the removal costs; and the standard deviation by chance.

    To first order, the loss of a token changes by -q, and the mean square of q is 2 LP. The mean of q over a text
    has the standard deviation sqrt(2 LP / tokens), which hides an LP below 2 / tokens.
    """
    return {"ratio": row["delta_nll"] / row["lp"] if row["lp"] else None, "chance": math.sqrt(2 * row["lp"] / row["tokens"])}


def _summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Agreement of measured losses with LP, in each FFN and in all FFNs together."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["module"]].append(row)
    if len(groups) > 1:
        groups["all"] = list(rows)
    return [{"module": name, "channels": len(some), **_agreement(some)} for name, some in groups.items()]


def _agreement(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    from scipy.stats import spearmanr

    lp, delta = (np.array([row[name] for row in rows], dtype=np.float64) for name in ("lp", "delta_nll"))
    resolved = lp > np.array([row["chance"] for row in rows], dtype=np.float64)
    several = len(rows) > 2
    return {
        "spearman": _known(spearmanr(lp, delta).statistic) if several else None,
        "spearman_of_size": _known(spearmanr(lp, np.abs(delta)).statistic) if several else None,
        "resolved": int(resolved.sum()),
        "median_ratio_of_resolved": float(np.median(delta[resolved] / lp[resolved])) if resolved.any() else None,
        "ratio_of_sums": float(delta.sum() / lp.sum()) if lp.sum() > 0 else None,
    }


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
