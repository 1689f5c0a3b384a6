"""Mean squared inputs of linear maps, such as the projections of attention, as an extension of an atlas. Pure numpy.

``spec/columns-1.md`` describes the group `GROUP`.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.errors import AtlasError
from chanfmt.base.parsed import parse_json
from chanfmt.format.columns import OWNER
from chanfmt.format.records import ExtensionGroup, ExtensionVariable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.format.reader import Atlas

GROUP = f"{OWNER}/inputs"
_NONE = -1
"""Value of ``expert`` if the maps belong to no expert."""


@dataclass(frozen=True, eq=False)
class Input:
    """What some linear maps read on the tokens of a calibration.

    Attributes:
        weights: Names of the maps' weights in the checkpoint. All of them read the same vectors.
        expert: Number of the expert that they belong to; None if they belong to no expert.
        tokens: Number of tokens that reached them.
        sums: Sum over these tokens of the square of each input, float64 (inputs,).
    """

    weights: tuple[str, ...]
    expert: int | None
    tokens: int
    sums: np.ndarray


def joined(inputs: Sequence[Input]) -> list[Input]:
    """``inputs`` with one row for maps of one expert, or of none, that read the same vectors, in the order given."""
    found: dict[tuple[object, ...], Input] = {}
    for item in inputs:
        key = (item.expert, item.tokens, item.sums.tobytes())
        other = found.get(key)
        weights = item.weights if other is None else tuple(dict.fromkeys((*other.weights, *item.weights)))
        found[key] = Input(weights, item.expert, item.tokens, item.sums)
    return list(found.values())


def inputs_group(inputs: Sequence[Input]) -> ExtensionGroup:
    """The extension that holds ``inputs``, at least one, in their order."""
    rows, sums = np.arange(len(inputs), dtype=np.int32), np.concatenate([item.sums for item in inputs])
    experts = [_NONE if item.expert is None else item.expert for item in inputs]
    one, many = ("input",), ("value",)
    return ExtensionGroup(
        GROUP,
        {},
        (
            ExtensionVariable("input", one, rows, "input index", "1", ""),
            ExtensionVariable("value", many, np.arange(len(sums), dtype=np.int32), "value index", "1", ""),
            ExtensionVariable(
                "weights",
                one,
                [json.dumps(item.weights) for item in inputs],
                "JSON list of the checkpoint's weights that read this input",
                "",
                "equal",
            ),
            ExtensionVariable("expert", one, np.array(experts, np.int32), "expert of these weights, or -1", "1", "equal"),
            ExtensionVariable(
                "length",
                one,
                np.array([len(item.sums) for item in inputs], np.int32),
                "number of values of the input, which follow those of the inputs before it",
                "1",
                "equal",
            ),
            ExtensionVariable(
                "tokens", one, np.array([item.tokens for item in inputs], np.int64), "tokens that reached the weights", "1", "sum"
            ),
            ExtensionVariable("sum_x2", many, sums, "sum over tokens of the squared value", "1", "sum"),
        ),
    )


def read_inputs(atlas: Atlas) -> list[Input]:
    """The inputs that ``atlas`` holds, in the order of the file; empty if it holds none.

    Raises:
        AtlasError: The group is not as the specification says.
    """
    group = atlas.extension(GROUP)
    if group is None:
        return []
    held = {item.name: item.values for item in group.variables}
    try:
        lengths, sums = held["length"].tolist(), np.asarray(held["sum_x2"], dtype=np.float64)
        tokens, experts = held["tokens"].tolist(), held["expert"].tolist()
        names = [tuple(parse_json(text, list[str])) for text in held["weights"]]
        ends = [0, *itertools.accumulate(lengths)]
        if min(lengths) < 1 or min(tokens) < 0 or min(experts) < _NONE:
            raise ValueError
        if ends[-1] != len(sums) or not (np.isfinite(sums).all() and (sums >= 0).all()):
            raise ValueError
        return [
            Input(weights, None if expert == _NONE else expert, count, sums[start:stop])
            for weights, expert, count, (start, stop) in zip(names, experts, tokens, itertools.pairwise(ends), strict=True)
        ]
    except (KeyError, ValueError, TypeError, AttributeError):
        raise AtlasError(f"{atlas.path}: /{GROUP} is not as the specification says") from None
