"""Does LP predict the cost of a channel? Remove single channels across the range of LP and compare the loss with LP."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.errors import UsageError
from chanfmt.format.unit import unit_rows
from surgery.experiments.ablation.experiment import Condition, Experiment, masses
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


def plan_channels(atlas: Atlas, options: ChannelOptions) -> Experiment:
    """Plan the experiment ``channels``.

    Raises:
        UsageError: An option has no meaning for this atlas.
    """
    if options.channels < 2:
        raise UsageError(f"--channels must be at least 2, not {options.channels}", hint="a correlation needs several channels")
    layers = chosen_layers(options.layers, atlas)
    if options.layers is None:
        ordered = sorted(layers)
        layers = frozenset({ordered[0], ordered[len(ordered) // 2], ordered[-1]})
    mass = masses(atlas)
    conditions = []
    for block in atlas.blocks:
        if block.layer_index not in layers:
            continue
        rows = unit_rows(mass[block.index])
        expert = int(np.argmax(atlas.stacks[block.stack].row("tokens", block.row))) if block.n_experts else 0
        order = np.argsort(-rows[expert], kind="stable")
        for rank in np.unique(np.linspace(0, len(order) - 1, min(options.channels, len(order))).round().astype(int)):
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
        extra=("rank", "lp"),
        concluded=("ratio", "chance"),
        conclude=_against_lp,
        summarise=_summarise,
    )


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
    return {
        "spearman": _known(spearmanr(lp, delta).statistic),
        "spearman_of_size": _known(spearmanr(lp, np.abs(delta)).statistic),
        "resolved": int(resolved.sum()),
        "median_ratio_of_resolved": float(np.median(delta[resolved] / lp[resolved])) if resolved.any() else None,
        "ratio_of_sums": float(delta.sum() / lp.sum()) if lp.sum() > 0 else None,
    }


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
