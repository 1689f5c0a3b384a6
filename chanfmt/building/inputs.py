"""The inputs of a model's linear maps as an atlas keeps them, from the statistics of a pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chanfmt.algebra.inputs import Input, joined
from chanfmt.format.records import READ_ROLES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chanfmt.building.statistics import FFNStatistics
    from chanfmt.format.records import TensorSlice
    from chanfmt.models.ffn import FFN


def read_weights(ffn: FFN, slices: Sequence[TensorSlice]) -> list[tuple[str, ...]]:
    """Names of the read projections' weights in the checkpoint, of ``ffn`` or of each of its experts."""
    count = len(slices) // len(ffn.members)
    return [
        tuple(dict.fromkeys(item.tensor for item in slices[start : start + count] if item.role in READ_ROLES))
        for start in range(0, len(slices), count)
    ]


def ffn_inputs(
    ffn: FFN, slices: Sequence[TensorSlice], statistics: FFNStatistics, names: Mapping[str, Sequence[str]]
) -> list[Input]:
    """The inputs of the read projections of ``ffn``, and those of the other maps of its block that it has.

    Args:
        slices: Where the weights of ``ffn`` lie in the checkpoint.
        names: Name of a parameter to the checkpoint tensors that hold it. A map without them is left out.
    """
    others = []
    for matrix, power, tokens in zip(ffn.other_maps, statistics.other_maps.power, statistics.other_maps.tokens, strict=True):
        if tokens and matrix.parameter in names:
            others.append(Input(tuple(names[matrix.parameter]), None, tokens, power.cpu().numpy()))
    reads = [
        Input(weights, number if ffn.experts else None, member.tokens, member.read_power.cpu().numpy())
        for number, (weights, member) in enumerate(zip(read_weights(ffn, slices), statistics.members, strict=True))
    ]
    return [*joined(others), *reads]
