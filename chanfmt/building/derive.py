"""Labelled stacks from statistics and weights: the last step of a build, which runs no model."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from chanfmt.algebra import labels, metrics
from chanfmt.building.on_device import nearest_in_core, pair_redundancies, redundancy_to_core
from chanfmt.building.statistics import CHANCE
from chanfmt.building.weight_metrics import reading, writing
from chanfmt.format import schema
from chanfmt.format.columns import REDUNDANCY_CHANCE
from chanfmt.format.records import LabelSettings, StackData, Stacked

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from chanfmt.building.statistics import ChannelStatistics, FFNStatistics
    from chanfmt.models.ffn import FFN
    from chanfmt.models.matrices import FFNWeights

_SUFFIXES = {"dense": "", "experts": ".experts", "shared": ".shared_expert"}


def layer_variables(
    statistics: FFNStatistics,
    weights: Iterable[FFNWeights],
    settings: LabelSettings,
    previous_support: np.ndarray | None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Every array of one FFN, and how much its supernodes write to each residual dimension.

    Args:
        weights: Weights of the FFN, or of each of its experts.
        previous_support: Write support of the layer before; None for the first layer.

    Returns:
        Name in `chanfmt.format.schema.STACK_VARIABLES`, or of a well-known column, to values without the layer dimension; write
        mass (d,).
    """
    found = [
        member_variables(member, of_member, settings, previous_support)
        for member, of_member in zip(statistics.members, weights, strict=True)
    ]
    mass = np.sum([mass for _, mass in found], axis=0)
    if not statistics.experts:
        return found[0][0], mass
    return by_expert([variables for variables, _ in found]), mass


def by_expert(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The variables of all experts of an FFN in one array each, from those of every expert."""
    return {name: np.stack([row[name] for row in rows], axis=_layer_axis(name)) for name in rows[0]}


def reduce(statistics: FFNStatistics, settings: LabelSettings) -> None:
    """Reduce the cross moments of a finished FFN to the arrays that `layer_variables` needs, to save memory."""
    for member in statistics.members:
        tokens = np.int64(member.tokens)
        score = metrics.derive_metrics(_sums(member), tokens)[settings.score]
        member.reduce(
            _redundancy(member, labels.supernodes(score, settings.rho), settings)
            if tokens
            else _unreached_redundancy(member.n_channels)
        )


def member_variables(
    statistics: ChannelStatistics, weights: FFNWeights, settings: LabelSettings, previous_support: np.ndarray | None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """As `layer_variables`, for one dense FFN or one expert."""
    tokens = np.int64(statistics.tokens)
    variables = _sums(statistics)
    variables |= metrics.derive_metrics(variables, tokens)
    # Labels rank the stored float32 metrics, so that a reader who ranks them gets the same sets.
    core = labels.supernodes(variables[settings.score], settings.rho) if tokens else None
    reads = reading(weights, previous_support, statistics.read_power / max(1, statistics.tokens))
    writes = writing(weights.write, core, settings.support_size)
    sizes = labels.support_sizes(len(weights.write), settings.support_size)
    variables |= {
        "write_norm": writes.norm,
        "write_norm_l1": writes.norm_l1,
        **reads.norms,
        "read_connectivity": reads.connectivity,
        "connectivity_at": writes.connectivity.astype(np.float32),
        "write_dimension": writes.dimension,
        "write_share": writes.share,
    }
    variables["connectivity"] = variables["connectivity_at"][sizes.index(settings.support_size)]
    if core is None:
        return _with_chance(variables | _unreached(statistics.n_channels)), writes.mass
    variables["wanda_group"] = reads.wanda + writes.norm_l1 * np.sqrt(variables["sum_u2"] / tokens)
    variables |= _redundancy(statistics, core, settings)
    variables["label"], variables["protection"] = labels.label_ffn(
        variables[settings.score], variables["connectivity"], variables["redundancy"], settings
    )
    return _with_chance(variables), writes.mass


def _with_chance(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``variables`` with `CHANCE` under the name of its column."""
    return {REDUNDANCY_CHANCE if name == CHANCE else name: values for name, values in variables.items()}


def _sums(statistics: ChannelStatistics) -> dict[str, np.ndarray]:
    return {
        "tokens": np.asarray(np.int64(statistics.tokens)),
        "tokens_split": statistics.tokens_split,
        **{name: values.cpu().numpy() for name, values in statistics.sums.items()},
        "sum_q2_split": statistics.split_q2.cpu().numpy(),
        "max_abs_u": statistics.max_abs_u.cpu().numpy(),
    }


def _unreached_redundancy(n_channels: int) -> dict[str, np.ndarray]:
    undefined = np.full(n_channels, np.nan)
    return {
        "redundancy": undefined,
        "redundancy_null": undefined,
        CHANCE: undefined,
        "redundancy_tokens": np.asarray(0),
        "core_covered": np.asarray(np.nan),
        **dict(zip(("redundancy_partner", "redundancy_pair"), _none_nearest(n_channels), strict=True)),
    }


def _none_nearest(n_channels: int) -> tuple[np.ndarray, np.ndarray]:
    shape = (schema.NEAREST, n_channels)
    return np.full(shape, -1, dtype=np.int32), np.full(shape, np.nan, dtype=np.float32)


def _unreached(n_channels: int) -> dict[str, np.ndarray]:
    """The arrays of an expert that got no token (spec section "Stacks"), besides those of its weights."""
    return _unreached_redundancy(n_channels) | {
        "wanda_group": np.full(n_channels, np.nan),
        "label": np.zeros(n_channels, dtype=np.uint8),
        "protection": np.ones(n_channels),
    }


def stack_layers(
    ffns: Sequence[FFN], layers: Sequence[Mapping[str, np.ndarray]], activation: str, support_size: int
) -> tuple[list[StackData], list[tuple[str, int]]]:
    """Stack FFNs of equal place, kind, width and gating; arrays gain the layer dimension, as `Stacked`.

    Returns:
        The stacks; for each FFN the name of its stack and its row there.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, ffn in enumerate(ffns):
        key = (ffn.place, ffn.kind, ffn.width, ffn.gated, ffn.experts, ffn.outputs)
        # Several FFNs of one kind in one layer cannot be rows of one array.
        slot = next(
            slot
            for slot in itertools.count()
            if not any(ffns[other].layer_index == ffn.layer_index for other in groups.get((*key, slot), ()))
        )
        groups.setdefault((*key, slot), []).append(index)
    stacks, position = [], {}
    for key, members in groups.items():
        name = _stack_name(key, list(groups))
        for row, index in enumerate(members):
            position[index] = (name, row)
        first = ffns[members[0]]
        supports = labels.support_sizes(first.outputs, support_size) if "connectivity_at" in layers[members[0]] else ()
        stacks.append(
            StackData(
                name,
                first.kind,
                first.gated,
                activation,
                np.array([ffns[index].layer_index for index in members], dtype=np.int32),
                first.width,
                first.experts,
                schema.SPLITS,
                dict(_stacked([layers[index] for index in members])),
                supports,
            )
        )
    return stacks, [position[index] for index in range(len(ffns))]


def _stack_name(key: tuple[Any, ...], keys: Sequence[tuple[Any, ...]]) -> str:
    """``decoder``, ``decoder.experts`` or ``decoder.shared_expert``, with a suffix that tells it from other stacks of that name."""
    place, kind, width, gated, experts, outputs, slot = key
    name = f"{place}{_SUFFIXES[kind]}"
    alike = [other for other in keys if other[:2] == key[:2]]
    if len({other[2] for other in alike}) > 1:
        name += f"-{width}"
    if len({other[3] for other in alike if other[2] == width}) > 1 and gated:
        name += "-gated"
    if len({other[4] for other in alike if other[2:4] == key[2:4]}) > 1:
        name += f"-x{experts}"
    if len({other[5] for other in alike if other[2:5] == key[2:5]}) > 1:
        name += f"-to-{outputs}"
    return f"{name}.{slot + 1}" if slot else name


def _stacked(rows: list[Mapping[str, np.ndarray]]) -> Iterator[tuple[str, Stacked]]:
    for name in rows[0]:
        yield name, Stacked(rows, name, _layer_axis(name))


def _layer_axis(name: str) -> int:
    """Axis of the layers in the array ``name``: a variable of the atlas, or a well-known column."""
    variable = schema.STACK_VARIABLE_BY_NAME.get(name)
    return 0 if variable is None else variable.dimensions.index("layer")


def _redundancy(statistics: ChannelStatistics, core: np.ndarray, settings: LabelSettings) -> dict[str, np.ndarray]:
    """Redundancy of the channels to the part of ``core`` that was among the candidates, and its null."""
    if statistics.reduced is not None:
        return statistics.reduced
    correlation = statistics.core
    if correlation is None or correlation.real.count < 2:
        return _unreached_redundancy(statistics.n_channels) | {"core_covered": np.asarray(0.0)}
    candidates = correlation.candidates
    columns = torch.isin(candidates, torch.from_numpy(core).to(candidates.device)).nonzero()[:, 0]
    covered = candidates[columns]
    top_k = settings.redundancy_top_k
    pairs = pair_redundancies(correlation.real, columns, covered)
    partner, pair = nearest_in_core(pairs, covered)
    null, chance = (
        redundancy_to_core(pair_redundancies(sums, columns, covered), top_k).cpu().numpy()
        if sums.count >= 2
        else np.full(statistics.n_channels, np.nan)
        for sums in (correlation.null, correlation.chance)
    )
    return {
        "redundancy_partner": partner,
        "redundancy_pair": pair,
        # Ranks, like those of every metric, are taken on the stored float32 values.
        "redundancy": redundancy_to_core(pairs, top_k).cpu().numpy().astype(np.float32),
        "redundancy_null": null,
        CHANCE: chance,
        "redundancy_tokens": np.asarray(correlation.real.count),
        "core_covered": np.asarray(len(covered) / len(core)),
    }
