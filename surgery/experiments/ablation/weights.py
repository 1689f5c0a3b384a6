"""What does one number of a write matrix cost? Set single weights to 0, beside other weights of the same channel and the channel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.errors import UsageError
from chanfmt.format.unit import unit_rows
from surgery.experiments.ablation.experiment import Condition, Experiment
from surgery.experiments.weight import Weight
from surgery.planning.addresses import check_channel, find_unit, parse_number

if TYPE_CHECKING:
    from chanfmt.format.reader import Atlas
    from chanfmt.format.records import Block

KEY = ("weight", "removed")


@dataclass(frozen=True)
class WeightOptions:
    """Which weights are set to 0, one at a time."""

    weight: tuple[str, ...] = field(
        metadata={
            "help": "weight of a write matrix: LAYER:ROW:CHANNEL, with the row of the matrix (the residual dimension that it writes to) "
            "and the channel; LAYER/EXPERT:ROW:CHANNEL for an expert; repeat for more",
            "metavar": "LAYER:ROW:CHANNEL",
            "repeat": True,
        }
    )
    controls: int = field(
        default=3,
        metadata={"help": "other rows of the same channel, also one at a time: those after ROW", "metavar": "N"},
    )


def plan_weights(atlas: Atlas, options: WeightOptions) -> Experiment:
    """Plan the experiment ``weights``: each weight, its controls, and its whole channel.

    Raises:
        UsageError: A weight has no meaning for this atlas.
    """
    if options.controls < 0:
        raise UsageError(f"--controls must be 0 or more, not {options.controls}")
    conditions = []
    for text in dict.fromkeys(options.weight):
        block, expert, row, channel = _parsed(text, atlas)
        whole = np.zeros(block.shape, dtype=bool)
        unit_rows(whole)[expert, channel] = True
        conditions.append(
            Condition(dict(zip(KEY, (text, "the weight"), strict=True)), {}, weights=(Weight(block.index, expert, row, channel),))
        )
        # The atlas does not say how many rows there are: behind the last row comes the first.
        conditions += [
            Condition(
                dict(zip(KEY, (text, f"row + {step}"), strict=True)),
                {},
                weights=(Weight(block.index, expert, row, channel, step),),
            )
            for step in range(1, options.controls + 1)
        ]
        conditions.append(Condition(dict(zip(KEY, (text, "the channel"), strict=True)), {block.index: whole}))
    return Experiment("weights", KEY, KEY, tuple(conditions), {"controls": options.controls})


def _parsed(text: str, atlas: Atlas) -> tuple[Block, int, int, int]:
    """The FFN, the expert (0 for a dense FFN), the row and the channel that ``text`` names. Raises `UsageError`."""
    parts = text.split(":")
    if len(parts) != 3:
        raise UsageError(f"--weight {text[:80]!r} is not a weight", hint="write LAYER:ROW:CHANNEL, such as 2:3968:7003")
    try:
        block, expert = find_unit(parts[0], atlas)
        row, channel = parse_number(parts[1], "a row"), parse_number(parts[2], "a channel")
        check_channel(channel, block.n_channels)
    except UsageError as error:
        raise UsageError(f"--weight {text[:80]}: {error.message}", hint=error.hint) from None
    return block, expert or 0, row, channel
