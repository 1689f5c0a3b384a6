"""Remove chosen channels, or replace them by their means, and do the same with equally many control channels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.analysis.controls import matched_control, random_control
from chanfmt.base.errors import UsageError
from chanfmt.format import schema
from surgery.experiments.ablation.experiment import Condition, Experiment, masses, mismatch, scopes, selected
from surgery.planning.grids import parse_names, parse_seeds
from surgery.planning.selectors import SYNTAX, by_label

if TYPE_CHECKING:
    from chanfmt.format.reader import Atlas

CONTROLS = ("random", "lp-matched")
KEY = ("layers", "select", "control", "seed")


@dataclass(frozen=True)
class RemovalOptions:
    """Which channels are removed, and what they are compared with."""

    select: tuple[str, ...] = field(
        default=("supernodes", "halo"),
        metadata={
            "help": f"channels to remove; repeat the option to measure several selections: {SYNTAX.replace('%', '%%')}",
            "metavar": "WHAT",
            "repeat": True,
        },
    )
    control: str = field(
        default="random",
        metadata={
            "help": "controls to remove for comparison, separated by commas: random, lp-matched (the nearest channels in LP), or "
            "none; a control has as many channels of every FFN as the selection, but neither selected channels nor supernodes",
            "metavar": "CONTROLS",
        },
    )
    seeds: str = field(default="0", metadata={"help": "seeds of random controls, such as 0,1,2 or 0-4", "metavar": "SEEDS"})
    layers: str | None = field(default=None, metadata={"help": "remove channels of these layers only", "metavar": "LAYERS"})
    one_layer_at_a_time: bool = field(default=False, metadata={"help": "remove channels of one layer at a time"})


def plan_removal(atlas: Atlas, options: RemovalOptions, *, mean: bool) -> Experiment:
    """Plan the experiment ``remove``, or ``mean-replace`` if ``mean`` is set.

    Raises:
        UsageError: An option has no meaning for this atlas.
        AtlasError: The atlas lacks what a selector or the means need.
    """
    controls = tuple(name for name in parse_names(options.control) if name != "none")
    for name in controls:
        if name not in CONTROLS:
            raise UsageError(f"unknown control {name!r}; choose from {', '.join(CONTROLS)}, none")
    seeds, areas = parse_seeds(options.seeds), scopes(atlas, options.layers, options.one_layer_at_a_time)
    core, mass = by_label(atlas, schema.LABEL_SUPERNODE), masses(atlas)
    conditions: list[Condition] = []
    warnings: list[str] = []
    for selector in dict.fromkeys(options.select):
        name, everywhere, notes = selected(selector, atlas, frozenset().union(*(area.layers for area in areas)))
        warnings += notes
        for area in areas:
            masks = {index: mask for index, mask in area.of(everywhere, atlas).items() if mask.any()}
            if not masks:
                continue
            pool = {index: ~(mask | core[index]) for index, mask in masks.items()}
            conditions.append(Condition(dict(zip(KEY, (area.name, name, None, None), strict=True)), masks))
            for control in controls:
                for seed in seeds if control == "random" else (None,):
                    chosen = {
                        index: matched_control(mask, pool[index], mass[index])
                        if seed is None
                        else random_control(mask, pool[index], np.random.default_rng([seed, index]))
                        for index, mask in masks.items()
                    }
                    conditions.append(Condition(dict(zip(KEY, (area.name, name, control, seed), strict=True)), chosen))
                    if seed is None:
                        where = f" of layer {area.name}" if options.one_layer_at_a_time else ""
                        warnings += mismatch(masks, chosen, mass, name + where)
    return Experiment(
        "mean-replace" if mean else "remove",
        KEY,
        ("select", "control"),
        tuple(conditions),
        {"layers": options.layers, "one_layer_at_a_time": options.one_layer_at_a_time},
        means=mean_activations(atlas) if mean else None,
        warnings=tuple(warnings),
    )


def mean_activations(atlas: Atlas) -> dict[int, np.ndarray]:
    """Block index to E[u] of its channels over their calibration tokens, float64 of `Block.shape`; 0 without any token.

    Raises:
        AtlasError: The atlas lacks the sums.
    """
    means = {}
    for block, stack in atlas.rows():
        tokens = np.asarray(stack.row("tokens", block.row), dtype=np.float64)[..., None]
        means[block.index] = np.asarray(stack.row("sum_u", block.row), dtype=np.float64) / np.maximum(tokens, 1)
    return means
