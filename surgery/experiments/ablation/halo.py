"""Does the halo matter only next to supernodes? Remove it with supernodes kept and removed, against channels of equal LP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.analysis.controls import matched_control, random_control
from chanfmt.format import schema
from surgery.experiments.ablation.experiment import Condition, Experiment, masses, mismatch, scopes, selected
from surgery.planning.grids import parse_seeds
from surgery.planning.selectors import by_label

if TYPE_CHECKING:
    from chanfmt.format.reader import Atlas
    from surgery.experiments.ablation.experiment import Masks

KEY = ("layers", "supernodes", "removed", "seed")


@dataclass(frozen=True)
class HaloOptions:
    """Where the halo is removed, and what it is compared with."""

    seeds: str = field(
        default="0",
        metadata={
            "help": "seeds of random controls, drawn from channels that are neither halo nor supernode, such as 0,1,2 or 0-4",
            "metavar": "SEEDS",
        },
    )
    layers: str | None = field(default=None, metadata={"help": "remove channels of these layers only", "metavar": "LAYERS"})
    one_layer_at_a_time: bool = field(default=False, metadata={"help": "remove channels of one layer at a time"})


def plan_halo(atlas: Atlas, options: HaloOptions) -> Experiment:
    """Plan the experiment ``halo``. A removal together with supernodes is compared with the removal of supernodes alone.

    Raises:
        UsageError: An option has no meaning for this atlas, or the chosen layers have no halo.
    """
    areas, seeds = scopes(atlas, options.layers, options.one_layer_at_a_time), parse_seeds(options.seeds)
    core, mass, halo = by_label(atlas, schema.LABEL_SUPERNODE), masses(atlas), by_label(atlas, schema.LABEL_HALO)
    selected("halo", atlas, frozenset().union(*(area.layers for area in areas)))
    conditions: list[Condition] = []
    warnings: list[str] = []
    for area in areas:
        masks = {index: mask for index, mask in area.of(halo, atlas).items() if mask.any()}
        if not masks:
            continue
        pool = {index: ~(mask | core[index]) for index, mask in masks.items()}
        matched = {index: matched_control(mask, pool[index], mass[index]) for index, mask in masks.items()}
        where = f" of layer {area.name}" if options.one_layer_at_a_time else ""
        warnings += mismatch(masks, matched, mass, "halo" + where)
        removals: list[tuple[str, int | None, Masks]] = [("halo", None, masks), ("lp-matched", None, matched)]
        for seed in seeds:
            drawn = {
                index: random_control(mask, pool[index], np.random.default_rng([seed, index])) for index, mask in masks.items()
            }
            removals.append(("random", seed, drawn))
        alone = Condition(dict(zip(KEY, (area.name, "removed", "nothing", None), strict=True)), area.of(core, atlas))
        conditions.append(alone)
        for what, drawn_by, chosen in removals:
            conditions.append(Condition(dict(zip(KEY, (area.name, "kept", what, drawn_by), strict=True)), chosen))
            both = {index: mask | chosen[index] if index in chosen else mask for index, mask in alone.removed.items()}
            conditions.append(Condition(dict(zip(KEY, (area.name, "removed", what, drawn_by), strict=True)), both, alone))
    return Experiment(
        "halo",
        KEY,
        ("supernodes", "removed"),
        tuple(conditions),
        {"layers": options.layers, "one_layer_at_a_time": options.one_layer_at_a_time},
        warnings=tuple(warnings),
    )
