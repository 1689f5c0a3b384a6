"""Statistics and weights to labelled stacks: the last step of a build, without running anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chanfmt import labels, metrics, schema
from chanfmt.models.weights import FFNWeights, norms, wanda_group
from chanfmt.records import LabelSettings, StackData

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chanfmt.models.discover import FFN
    from chanfmt.produce.statistics import ChannelStatistics


def layer_variables(
    statistics: ChannelStatistics,
    weights: FFNWeights,
    settings: LabelSettings,
    previous_support: np.ndarray | None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Every array of one FFN, and its write support for the next layer's read connectivity.

    Args:
        previous_support: Write support of the layer before, None for the first.

    Returns:
        Name to values in `chanfmt.schema.STACK_VARIABLES`, without the layer dimension; support (K,).
    """
    tokens = np.int64(statistics.tokens)
    variables: dict[str, np.ndarray] = {
        "tokens": np.asarray(tokens),
        "tokens_split": statistics.tokens_split,
        **{name: values.cpu().numpy() for name, values in statistics.sums.items()},
        "sum_q2_split": statistics.split_q2.cpu().numpy(),
        "max_abs_u": statistics.max_abs_u.cpu().numpy(),
        **norms(weights),
    }
    variables |= metrics.derive_metrics(variables, tokens)
    variables["wanda_group"] = wanda_group(
        weights, statistics.read_power.cpu().numpy() / tokens, variables["sum_u2"] / tokens
    )
    # Labels rank the stored float32 metrics, so that a reader who ranks them gets the same sets.
    core = labels.supernodes(variables[settings.score], settings.rho)
    sizes = labels.support_sizes(len(weights.write), settings.support_size)
    variables["connectivity_at"] = labels.connectivity(weights.write, core, sizes).astype(np.float32)
    variables["connectivity"] = variables["connectivity_at"][sizes.index(settings.support_size)]
    variables["read_connectivity"] = (
        np.full(statistics.n_channels, np.nan) if previous_support is None
        else labels.read_connectivity(list(weights.reads.values()), previous_support)
    )
    variables |= _redundancy(statistics, core, settings)
    variables["label"], variables["protection"] = labels.label_ffn(
        variables[settings.score], variables["connectivity"], variables["redundancy"], settings
    )
    support = labels.write_support(weights.write, core, settings.support_size)
    return variables, support


def stack_layers(
    ffns: Sequence[FFN], layers: Sequence[dict[str, np.ndarray]], activation: str, place: str, supports: tuple[int, ...]
) -> tuple[list[StackData], list[tuple[str, int]]]:
    """Stack FFNs of equal width and gating; arrays gain the layer dimension.

    Args:
        supports: Write support sizes of ``connectivity_at``.

    Returns:
        The stacks, and per FFN its stack's name and its row there.
    """
    groups: dict[tuple[int, bool], list[int]] = {}
    for index, ffn in enumerate(ffns):
        groups.setdefault((ffn.width, ffn.gated), []).append(index)
    widths_alone = len({width for width, _ in groups}) == len(groups)
    stacks, position = [], {}
    for (width, gated), members in groups.items():
        name = place
        if len(groups) > 1:
            name = f"{place}-{width}" if widths_alone else f"{place}-{width}{'-gated' if gated else ''}"
        for row, index in enumerate(members):
            position[index] = (name, row)
        stacks.append(StackData(
            name, "dense", gated, activation, np.array([ffns[index].layer_index for index in members], dtype=np.int32),
            width, 0, schema.SPLITS, dict(_stacked([layers[index] for index in members])), supports,
        ))
    return stacks, [position[index] for index in range(len(ffns))]


def _stacked(rows: list[dict[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    for name in rows[0]:
        axis = schema.STACK_VARIABLE_BY_NAME[name].dimensions.index("layer")
        yield name, np.stack([row[name] for row in rows], axis=axis)


def _redundancy(
    statistics: ChannelStatistics, core: np.ndarray, settings: LabelSettings
) -> dict[str, np.ndarray]:
    """Redundancy to the part of ``core`` that was among the candidates, and its null."""
    correlation = statistics.core
    if correlation is None or correlation.real.count < 2:
        undefined = np.full(statistics.n_channels, np.nan)
        return {"redundancy": undefined, "redundancy_null": undefined,
                "redundancy_tokens": np.asarray(0), "core_covered": np.asarray(0.0)}
    candidates = correlation.candidates.cpu().numpy()
    columns = np.flatnonzero(np.isin(candidates, core))
    covered = candidates[columns]
    top_k = settings.redundancy_top_k
    null = (
        labels.redundancy_to_core(correlation.null.correlation(columns), covered, top_k)
        if correlation.null.count >= 2 else np.full(statistics.n_channels, np.nan)
    )
    return {
        # Ranks, like those of every metric, are taken on what is stored.
        "redundancy": labels.redundancy_to_core(correlation.real.correlation(columns), covered, top_k).astype(np.float32),
        "redundancy_null": null,
        "redundancy_tokens": np.asarray(correlation.real.count),
        "core_covered": np.asarray(len(covered) / len(core)),
    }
