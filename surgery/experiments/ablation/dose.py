"""How much of the damage of a cut comes from supernodes? At one sparsity, remove more and more of them in place of others."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.errors import UsageError
from chanfmt.format import schema
from chanfmt.format.unit import unit_rows
from surgery.experiments.ablation.experiment import Condition, Experiment, Scope
from surgery.planning.addresses import chosen_layers
from surgery.planning.grids import parse_seeds, parse_shares
from surgery.planning.methods import METHODS, score
from surgery.planning.selectors import by_label
from surgery.planning.width import check_sparsity, kept_width

if TYPE_CHECKING:
    from chanfmt.format.reader import Atlas
    from chanfmt.format.records import Block

KEY = ("dose", "seed")


@dataclass(frozen=True)
class DoseOptions:
    """How many channels are removed, and how many of them are supernodes."""

    sparsity: float = field(default=0.5, metadata={"help": "share of the channels to remove from every FFN", "metavar": "S"})
    doses: str = field(
        default="0:1:0.1",
        metadata={
            "help": "shares of the supernodes to remove: FIRST:LAST:STEP, or numbers separated by commas",
            "metavar": "GRID",
        },
    )
    method: str = field(
        default="scar-lp",
        metadata={
            "help": f"method that ranks the other channels: {', '.join(METHODS)}",
            "metavar": "METHOD",
        },
    )
    seeds: str = field(
        default="0",
        metadata={
            "help": "seeds of the order in which supernodes are removed, such as 0,1,2 or 0-4",
            "metavar": "SEEDS",
        },
    )
    layers: str | None = field(default=None, metadata={"help": "remove channels of these layers only", "metavar": "LAYERS"})
    multiple_of: int | None = field(
        default=None,
        metadata={
            "help": "round kept widths to a multiple of N (default: as surgery plan does)",
            "metavar": "N",
        },
    )


def plan_dose(atlas: Atlas, options: DoseOptions) -> Experiment:
    """Plan the experiment ``dose``. With one seed, the supernodes removed at a dose are also removed at every higher dose.

    Raises:
        UsageError: An option has no meaning, or an FFN has too many supernodes for this sparsity.
        AtlasError: The atlas lacks what the method needs.
    """
    check_sparsity(options.sparsity)
    doses, seeds = parse_shares(options.doses, "--doses"), parse_seeds(options.seeds)
    layers = chosen_layers(options.layers, atlas)
    cores = Scope("", layers).of(by_label(atlas, schema.LABEL_SUPERNODE), atlas)
    conditions = []
    for seed in seeds:
        orders = {}
        for block in atlas.blocks:
            if block.index in cores:
                width = kept_width(block.n_channels, options.sparsity, options.multiple_of)
                orders[block.index] = (block.n_channels - width, _order(atlas, block, cores[block.index], options.method, seed))
                _check_room(block, cores[block.index], width)
        for dose in doses:
            removed = {index: _removed(cores[index], *orders[index], dose, seed, index) for index in cores}
            conditions.append(Condition(dict(zip(KEY, (dose, seed), strict=True)), removed))
    return Experiment(
        "dose",
        KEY,
        ("dose",),
        tuple(conditions),
        {"sparsity": options.sparsity, "method": options.method, "layers": options.layers, "multiple_of": options.multiple_of},
    )


def _order(atlas: Atlas, block: Block, core: np.ndarray, method: str, seed: int) -> np.ndarray:
    """Channels of each row in the order of their removal, supernodes last; int (row, channel)."""
    values = np.where(core, np.inf, score(method, atlas, block, seed))
    # As in a plan: if scores are equal, the highest index is removed first.
    return np.argsort(-unit_rows(values), axis=-1, kind="stable")[:, ::-1]


def _removed(core: np.ndarray, count: int, order: np.ndarray, dose: float, seed: int, index: int) -> np.ndarray:
    """A mask of ``count`` channels of every row, among them the share ``dose`` of the supernodes."""
    removed = np.zeros(core.shape, dtype=bool)
    generator = np.random.default_rng([seed, index])
    for row, ranked, gone in zip(unit_rows(core), order, unit_rows(removed), strict=True):
        nodes = generator.permutation(np.flatnonzero(row))
        forced = nodes[: math.floor(dose * len(nodes) + 0.5)]
        gone[forced] = True
        gone[ranked[: count - len(forced)]] = True
    return removed


def _check_room(block: Block, core: np.ndarray, kept: int) -> None:
    most = int(unit_rows(core).sum(axis=-1).max())
    removed = block.n_channels - kept
    if most > kept or most > removed:
        what = "keeps" if most > kept else "removes"
        raise UsageError(
            f"layer {block.layer_index} has {most} supernodes and {what} {min(kept, removed)} channels at this "
            "sparsity, so not every dose is possible",
            hint="choose another --sparsity",
        )
