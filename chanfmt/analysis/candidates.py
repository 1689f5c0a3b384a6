"""Super-weight candidates of a model: single weights that a very large activation meets. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.errors import AtlasError, UsageError
from chanfmt.format.columns import OWNER

if TYPE_CHECKING:
    from chanfmt.format.reader import Atlas, Stack

_VALUE = f"{OWNER}/super_weight"


@dataclass(frozen=True)
class SuperWeight:
    """A candidate: the largest weight that one channel writes with, and the channel's largest activation.

    Attributes:
        layer, stack, expert, channel: The channel. The expert is None in a dense FFN.
        row: Row of the write matrix, which is the residual dimension, with the largest |w| of the channel.
        value: ``peak`` times that |w|.
        peak: Largest |u| of the channel.
        token, position, sequence: Where |u| is largest: token id, position in the sequence, and number of the sequence in the
            calibration. Each is None if the atlas does not hold it.
    """

    layer: int
    stack: str
    expert: int | None
    channel: int
    row: int | None
    value: float
    peak: float | None
    token: int | None
    position: int | None
    sequence: int | None


def super_weights(atlas: Atlas, count: int = 10) -> list[SuperWeight]:
    """The ``count`` channels of all FFNs with the largest ``x_common/super_weight``, largest first; 0 for all.

    A super weight is one scalar whose removal destroys a model (Yu et al. 2024, arXiv 2411.07191). It lies in a write
    projection, where a very large activation meets a large weight. This finds where to look; an ablation confirms it.

    Raises:
        AtlasError: The atlas does not hold the column.
        UsageError: ``count`` is negative.
    """
    if count < 0:
        raise UsageError(f"the number of candidates must be 0 or more, not {count}")
    found: list[tuple[float, str, tuple[int, ...]]] = []
    for name, stack in atlas.stacks.items():
        if _VALUE not in stack:
            continue
        values = np.nan_to_num(stack[_VALUE], nan=-np.inf)
        order = np.argsort(-values, axis=None, kind="stable")[: count or None]
        places = zip(*(axis.tolist() for axis in np.unravel_index(order, values.shape)), strict=True)
        found += [(float(values[place]), name, place) for place in places if values[place] > -np.inf]
    if not any(_VALUE in stack for stack in atlas.stacks.values()):
        raise AtlasError(f"the atlas has no {_VALUE}", hint="build it with --columns peaks")
    # Equal candidates come in the order of layers.
    found.sort(key=lambda item: (-item[0], int(atlas.stacks[item[1]].layers[item[2][0]]), *item[2]))
    return [_candidate(atlas.stacks[name], name, value, place) for value, name, place in found[: count or None]]


def _candidate(stack: Stack, name: str, value: float, place: tuple[int, ...]) -> SuperWeight:
    def whole(column: str) -> int | None:
        number = int(stack[f"{OWNER}/{column}"][place]) if f"{OWNER}/{column}" in stack else -1
        return None if number < 0 else number

    return SuperWeight(
        layer=int(stack.layers[place[0]]),
        stack=name,
        expert=place[1] if len(place) == 3 else None,
        channel=place[-1],
        row=whole("super_weight_row"),
        value=value,
        peak=float(stack["max_abs_u"][place]) if "max_abs_u" in stack else None,
        token=whole("peak_token"),
        position=whole("peak_position"),
        sequence=whole("peak_sequence"),
    )
