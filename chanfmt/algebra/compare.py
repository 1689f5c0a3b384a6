"""Compare two atlases of one architecture: do they rank and label the same channels? Pure numpy.

`scipy.stats` gives the same ranks, correlations and chances, and the tests compare with it. It is not used here, because
importing it takes longer than comparing two atlases, and `spearmanr` takes seven times as long per FFN.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from chanfmt.algebra.labels import supernode_count, top_indices
from chanfmt.base.choices import unknown
from chanfmt.base.errors import AtlasError
from chanfmt.format import schema
from chanfmt.format.unit import unit_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.format.reader import Atlas
    from chanfmt.format.records import Block


@dataclass(frozen=True)
class ChannelComparison:
    """The channels of one FFN in two measurements. The channels of all experts count together.

    Undefined numbers are NaN.

    Attributes:
        channels: Channels of all experts.
        correlation: Spearman's rank correlation of the metric over the channels whose value is known in both atlases; tied
            values share their mean rank. Undefined if the metric is constant in one atlas.
        supernodes_first, supernodes_second, supernodes_shared: Sizes of the two sets and of their intersection.
        supernode_jaccard: Jaccard index of the two sets: shared supernodes over the supernodes in at least one set.
        supernode_chance: Expected Jaccard index if both sets are drawn at random, with their present sizes in every expert.
        halo_jaccard, halo_chance: The same two numbers for the halos.
        captured: Mass of the first atlas's metric in the second atlas's supernodes, over the mass in the first atlas's own
            supernodes.
        captured_chance: The same share for as many channels as the second atlas has supernodes, drawn at random.
        top_jaccard, top_chance: The two numbers for the channels of largest metric, as many in every expert as the first
            atlas's rho gives.
    """

    channels: int
    correlation: float
    supernodes_first: int
    supernodes_second: int
    supernodes_shared: int
    supernode_jaccard: float
    supernode_chance: float
    halo_jaccard: float
    halo_chance: float
    captured: float
    captured_chance: float
    top_jaccard: float
    top_chance: float


@dataclass(frozen=True)
class _Place:
    layer: int
    stack: str
    module: str


@dataclass(frozen=True)
class FFNComparison(ChannelComparison, _Place):
    """One FFN in two atlases: its numbers, and where it is.

    Attributes:
        layer, stack, module: The FFN, by its names in the first atlas.
    """


def compare_channels(
    first: np.ndarray, second: np.ndarray, first_labels: np.ndarray, second_labels: np.ndarray, rho: float = 0.01
) -> ChannelComparison:
    """`ChannelComparison` of one FFN.

    Args:
        first, second: One metric in the two measurements, (channel,) or (expert, channel).
        first_labels, second_labels: Labels, uint8, in the same shape: 0 none, 1 halo, 2 supernode.
        rho: Size of the top sets, as a share of the channels of each expert.
    """
    labels = [unit_rows(np.asarray(given)) for given in (first_labels, second_labels)]
    values = [np.asarray(given).astype(np.float64).ravel() for given in (first, second)]
    core = [label == schema.LABEL_SUPERNODE for label in labels]
    halo = [label == schema.LABEL_HALO for label in labels]
    tops = [_top(row.reshape(label.shape), rho) for row, label in zip(values, labels, strict=True)]
    own, captured = (float(np.nansum(values[0][members.ravel()])) for members in core)
    return ChannelComparison(
        channels=values[0].size,
        correlation=rank_correlation(*values),
        supernodes_first=int(core[0].sum()),
        supernodes_second=int(core[1].sum()),
        supernodes_shared=int((core[0] & core[1]).sum()),
        supernode_jaccard=_jaccard(*core),
        supernode_chance=_chance(*core),
        halo_jaccard=_jaccard(*halo),
        halo_chance=_chance(*halo),
        captured=captured / own if own > 0 else float("nan"),
        captured_chance=float(np.nansum(values[0])) * core[1].mean() / own if own > 0 else float("nan"),
        top_jaccard=_jaccard(*tops),
        top_chance=_chance(*tops),
    )


def compare(first: Atlas, second: Atlas, metric: str = "lp") -> list[FFNComparison]:
    """Compare ``metric`` and the labels of every FFN, in model order.

    Revisions, weights and calibration texts of the two atlases may differ.

    Args:
        metric: One of `chanfmt.format.schema.METRICS`, or a metric of another program that both atlases hold, ``x_owner/name``.

    Raises:
        UsageError: ``metric`` is neither.
        AtlasError: The models have different FFNs, or one atlas does not hold ``metric`` or labels.
    """
    known = dict.fromkeys([*schema.METRIC_BY_NAME, *_extension_names(first), *_extension_names(second)])
    if metric not in known:
        raise unknown("metric", metric, known)
    check_same_ffns(first, second)
    for atlas in (first, second):
        _check_holds(atlas, metric)
    counterparts = {block.module: block for block in second.blocks}
    return [_compare_ffn(first, block, second, counterparts[block.module], metric) for block in first.blocks]


class Note(NamedTuple):
    """A caution for the reader of a comparison, in a few words and in a sentence."""

    short: str
    sentence: str


def shared_sequences(first: Atlas, second: Atlas) -> int:
    """Number of calibration sequences that both atlases hold."""
    return len({*first.calibration.sequence_sha256} & {*second.calibration.sequence_sha256})


def shared_text_note(first: Atlas, second: Atlas) -> Note | None:
    """A note that both atlases were measured on some of the same text; None if they were not."""
    shared, smaller = shared_sequences(first, second), min(first.calibration.sequences, second.calibration.sequences)
    return (
        Note(
            f"{shared:,} of {smaller:,} sequences in both",
            f"{shared:,} of {smaller:,} calibration sequences are in both: the two are not independent",
        )
        if shared
        else None
    )


def special_tokens_note(first: Atlas, second: Atlas) -> Note | None:
    """A note that the sequences of the atlases do not begin and end alike; None if they do."""
    ours, theirs = first.calibration, second.calibration
    return (
        None
        if ours.begins_like(theirs)
        else Note(
            "sequences begin differently",
            f"the sequences of one {ours.ends}, and those of the other {theirs.ends}: some of the difference comes from this",
        )
    )


def label_settings_note(first: Atlas, second: Atlas) -> Note | None:
    """A note that the atlases were labelled with different settings; None if the settings are equal."""
    ours, theirs = (dataclasses.asdict(atlas.labels) for atlas in (first, second))
    differing = [name for name in ours if ours[name] != theirs[name]]
    settings = ", ".join(f"{name} {ours[name]} and {theirs[name]}" for name in differing)
    return (
        Note(f"labels by other settings: {', '.join(differing)}", f"the labels were made with different settings: {settings}")
        if differing
        else None
    )


def check_same_ffns(first: Atlas, second: Atlas) -> None:
    """Raise `AtlasError` if the models differ in the name, the width or the number of experts of an FFN."""
    shapes = [{block.module: (block.n_channels, block.n_experts) for block in atlas.blocks} for atlas in (first, second)]
    hint = "compare atlases of one architecture; text, weights and settings may differ"
    for atlas, own, other in ((first, shapes[0], shapes[1]), (second, shapes[1], shapes[0])):
        missing = [module for module in own if module not in other]
        if missing:
            more = f" and {len(missing) - 1} others that the other atlas lacks" if len(missing) > 1 else ""
            raise AtlasError(f"only {atlas.path} has an FFN {missing[0]}{more}", hint=hint)
    for module, (channels, experts) in shapes[0].items():
        if shapes[1][module] != (channels, experts):
            raise AtlasError(
                f"the FFN {module} has {_shape(channels, experts)} in {first.path} and "
                f"{_shape(*shapes[1][module])} in {second.path}",
                hint=hint,
            )


def medians(rows: Sequence[FFNComparison]) -> dict[str, float]:
    """Median over FFNs of every fractional number of ``rows``, without undefined values; NaN if all are undefined."""
    names = [field.name for field in dataclasses.fields(FFNComparison) if field.type == "float"]
    result = {}
    for name in names:
        values = np.array([getattr(row, name) for row in rows], dtype=np.float64)
        known = values[~np.isnan(values)]
        result[name] = float(np.median(known)) if len(known) else float("nan")
    return result


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation of two 1-D arrays over the places where neither array is NaN.

    Equal values share the mean of their ranks. The result is NaN if fewer than two places are left, or if one array is
    constant there.
    """
    known = ~(np.isnan(first) | np.isnan(second))
    ranks = [_average_ranks(values[known]) for values in (first, second)]
    # The mean of n ranks is (n + 1) / 2 with and without ties, so a constant array deviates from it by exactly zero.
    a, b = (values - (len(values) + 1) / 2 for values in ranks)
    scale = np.sqrt(np.dot(a, a)) * np.sqrt(np.dot(b, b))
    return float(np.clip(np.dot(a, b) / scale, -1.0, 1.0)) if scale > 0 else float("nan")


def expected_jaccard(channels: int, first: Sequence[int], second: Sequence[int]) -> float:
    """Mean Jaccard index of random sets.

    Args:
        channels: Channels to draw from in each expert; a dense FFN counts as one expert.
        first, second: Size of each of the two sets in every expert; both have the same length.

    Returns:
        Expectation over sets that are drawn independently in every expert; NaN if both sets are empty.

    >>> round(expected_jaccard(14336, [143], [143]), 4)
    0.005
    """
    total = sum(first) + sum(second)
    if not total:
        return float("nan")
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, channels + 1)))])
    # The size of the intersection has a hypergeometric distribution in one expert, and their convolution in several.
    start, probability = 0, np.ones(1)
    for a, b in zip(first, second, strict=True):
        below, alone = _without_tails(_hypergeometric(channels, a, b, log_factorial))
        cut, probability = _without_tails(np.convolve(probability, alone))
        start += below + cut
    shared = start + np.arange(len(probability))
    return float(np.sum(probability * shared / (total - shared)) / np.sum(probability))


def _compare_ffn(first: Atlas, block: Block, second: Atlas, other: Block, metric: str) -> FFNComparison:
    held = ((first.stacks[block.stack], block.row), (second.stacks[other.stack], other.row))
    values = [stack.row(metric, row) for stack, row in held]
    labels = [stack.row("label", row) for stack, row in held]
    found = compare_channels(values[0], values[1], labels[0], labels[1], first.labels.rho)
    return FFNComparison(layer=block.layer_index, stack=block.stack, module=block.module, **vars(found))


def _top(values: np.ndarray, rho: float) -> np.ndarray:
    """The ``rho`` largest of each expert's ``values``, bool (expert, channel); none if a value of the expert is unknown."""
    mask = np.zeros(values.shape, dtype=bool)
    for row, chosen in zip(values, mask, strict=True):
        if not np.isnan(row).any():
            chosen[top_indices(row, supernode_count(len(row), rho))] = True
    return mask


def _check_holds(atlas: Atlas, metric: str) -> None:
    for stack in atlas.stacks.values():
        for name in (metric, "label"):
            if name in stack:
                continue
            what = "labels" if name == "label" else repr(name)
            if atlas.status == "partial":
                hint = "it comes from an unfinished build; finish it with: atlas build ... --resume"
            else:
                names = [item.name for item in stack.all_metrics]
                common = [held for held in names if all(held in other for other in atlas.stacks.values())]
                hint = f"metrics it holds: {', '.join(common)}"
            raise AtlasError(f"{atlas.path} holds no {what} for {stack.name}", hint=hint)


def _extension_names(atlas: Atlas) -> list[str]:
    return [name for stack in atlas.stacks.values() for name in stack.extension_names]


def _shape(channels: int, experts: int) -> str:
    return f"{experts} x {channels} channels" if experts else f"{channels} channels"


def _average_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _hypergeometric(channels: int, first: int, second: int, log_factorial: np.ndarray) -> np.ndarray:
    """Probability that random sets of ``first`` and ``second`` channels share 0, 1, ... min(first, second)."""
    shared = np.arange(min(first, second) + 1)
    rest = channels - first - second + shared
    possible = rest >= 0
    shared, rest = shared[possible], rest[possible]
    logarithm = (
        log_factorial[[first, second, channels - first, channels - second]].sum()
        - log_factorial[channels]
        - log_factorial[shared]
        - log_factorial[first - shared]
        - log_factorial[second - shared]
        - log_factorial[rest]
    )
    probability = np.zeros(len(possible))
    probability[possible] = np.exp(logarithm)
    return probability


def _without_tails(probability: np.ndarray) -> tuple[int, np.ndarray]:
    """The part of ``probability`` that is not negligible beside its peak, after the index of its first value.

    Without this cut, the distribution for hundreds of experts would have a value for every one of their channels.
    """
    counts = np.flatnonzero(probability > np.finfo(np.float64).eps ** 2 * probability.max())
    return int(counts[0]), probability[counts[0] : counts[-1] + 1]


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    either = int((first | second).sum())
    return int((first & second).sum()) / either if either else float("nan")


def _chance(first: np.ndarray, second: np.ndarray) -> float:
    return expected_jaccard(first.shape[1], first.sum(axis=1).tolist(), second.sum(axis=1).tolist())
