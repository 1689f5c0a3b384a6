"""What ``--protect`` and ``--unprotect`` understand: by label, by metric, by id, or from a file."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.algebra.labels import supernode_count
from chanfmt.base.choices import did_you_mean
from chanfmt.base.errors import UsageError
from chanfmt.base.inputs import input_path
from chanfmt.format import schema
from surgery.planning.addresses import channel_ids, find_unit, parse_layers, parse_number, parse_ranges
from surgery.planning.protect_file import SUFFIXES, mark, no_channels, read_protect_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from chanfmt.format.reader import Atlas

SYNTAX = (
    "supernodes, halo, supernodes+halo, none, top:METRIC=2%, top:METRIC=50, rank:METRIC=A-B, above:METRIC=VALUE, "
    "below:METRIC=VALUE, LAYER:IDS, or a FILE that ends in .json, .csv or .txt; add @LAYERS to restrict a selector to some layers"
)
_LABELS = {
    "supernodes": (schema.LABEL_SUPERNODE,),
    "halo": (schema.LABEL_HALO,),
    "supernodes+halo": (schema.LABEL_SUPERNODE, schema.LABEL_HALO),
    "none": (),
}
_BY_METRIC = re.compile(r"(top|rank|above|below):([^=]*)=(.*)", re.DOTALL)
_BY_ID = re.compile(r"([^:]*[0-9]):(.*)", re.DOTALL)


def select(selector: str, atlas: Atlas) -> tuple[dict[int, np.ndarray], tuple[str, ...]]:
    """The channels that ``selector`` names (see `SYNTAX`).

    Returns:
        Block index to a mask of the selected channels, bool of `Block.shape`, for every FFN; and warnings.

    Raises:
        UsageError: The selector has no meaning for this atlas.
        AtlasError: The atlas lacks the metric.
    """
    text, layers = _split_layers(selector, atlas)
    warnings: tuple[str, ...] = ()
    if text in _LABELS:
        masks = by_label(atlas, *_LABELS[text])
    elif match := _BY_METRIC.fullmatch(text):
        masks = _by_metric(match[1], match[2], match[3], selector, atlas, layers)
    elif _is_file(text):
        masks, warnings = read_protect_file(input_path(text), atlas)
    elif match := _BY_ID.fullmatch(text):
        masks = _by_id(match[1], match[2], selector, atlas)
    else:
        raise UsageError(f"unknown selector {selector!r}{did_you_mean(text, _LABELS)}", hint=f"write {SYNTAX}")
    for block in atlas.blocks:
        if layers is not None and block.layer_index not in layers:
            masks[block.index][...] = False
    return masks, warnings


def file_name(selector: str) -> str:
    """``selector``, with a file's name in place of its path: a plan travels with the model, and must not tell paths."""
    text, separator, layers = (selector, "", "") if _is_file(selector) else selector.rpartition("@")
    if not separator:
        text, layers = selector, ""
    return (Path(text).name if _is_file(text) else text) + separator + layers


def _is_file(text: str) -> bool:
    return text.endswith(SUFFIXES)


def _split_layers(selector: str, atlas: Atlas) -> tuple[str, frozenset[int] | None]:
    """A selector and the layers that a suffix such as ``@0-3,7`` restricts it to; None for all layers."""
    if _is_file(selector) or "@" not in selector:
        return selector, None
    text, _, layers = selector.rpartition("@")
    try:
        return text, parse_layers(layers, atlas)
    except UsageError as error:
        raise UsageError(f"{selector}: {error.message}", hint=error.hint) from None


def by_label(atlas: Atlas, *labels: int) -> dict[int, np.ndarray]:
    """Block index to a mask of the channels that have one of ``labels``, bool of `Block.shape`."""
    return {block.index: np.isin(stack.row("label", block.row), labels) for block, stack in atlas.rows()}


def _by_id(key: str, ids: str, selector: str, atlas: Atlas) -> dict[int, np.ndarray]:
    masks = no_channels(atlas)
    try:
        block, expert = find_unit(key, atlas)
        mark(masks, block, expert, channel_ids(ids, block.n_channels))
    except UsageError as error:
        raise UsageError(f"{selector[:80]}: {error.message}", hint=error.hint) from None
    return masks


def _by_metric(
    kind: str, metric: str, value: str, selector: str, atlas: Atlas, layers: frozenset[int] | None
) -> dict[int, np.ndarray]:
    known = dict.fromkeys([*schema.METRIC_BY_NAME, *(name for stack in atlas.stacks.values() for name in stack.extension_names)])
    if metric not in known:
        raise UsageError(
            f"{selector}: unknown metric {metric!r}{_did_you_mean(metric, known)}", hint=f"choose from {', '.join(known)}"
        )
    try:
        choose = _CHOICES[kind](value)
        return {
            block.index: choose(np.asarray(stack.row(metric, block.row), dtype=np.float64))
            if layers is None or block.layer_index in layers
            else np.zeros(block.shape, dtype=bool)
            for block, stack in atlas.rows()
        }
    except UsageError as error:
        raise UsageError(f"{selector}: {error.message}", hint=error.hint) from None


def _did_you_mean(metric: str, known: Iterable[str]) -> str:
    """As `did_you_mean`. The metric of another program may be written without its owner."""
    owned = [name for name in known if name.rpartition("/")[2] == metric]
    return f"; did you mean {owned[0]}?" if owned else did_you_mean(metric, known)


def _top(text: str) -> Callable[[np.ndarray], np.ndarray]:
    if not text.endswith("%"):
        return _ranks(1, parse_number(text, "a count or a percentage"))
    share = _number(text.removesuffix("%")) / 100
    if not 0 < share <= 1:
        raise UsageError(f"{text} must be above 0% and at most 100%")
    # The same rounding as for supernodes, so that top:lp with the share rho selects the supernodes.
    return lambda values: _ranks(1, supernode_count(values.shape[-1], share))(values)


def _rank(text: str) -> Callable[[np.ndarray], np.ndarray]:
    ranges = parse_ranges(text, "a rank")
    if len(ranges) > 1:
        raise UsageError(f"{text} is more than one range", hint="repeat the selector for each range")
    return _ranks(*ranges[0])


def _ranks(first: int, last: int) -> Callable[[np.ndarray], np.ndarray]:
    """Channels from rank ``first`` to ``last``. Rank 1 is the largest value; if values are equal, the lowest index comes first."""
    if first < 1 or last < 1:
        raise UsageError("ranks and counts start at 1")

    def choose(values: np.ndarray) -> np.ndarray:
        if last > values.shape[-1]:
            raise UsageError(f"there is no rank {last}: an FFN has {values.shape[-1]} channels")
        # NaN sorts last and has no rank.
        order = np.argsort(-values, axis=-1, kind="stable")[..., first - 1 : last]
        chosen = np.zeros(values.shape, dtype=bool)
        np.put_along_axis(chosen, order, True, axis=-1)
        return chosen & ~np.isnan(values)

    return choose


def _above(text: str) -> Callable[[np.ndarray], np.ndarray]:
    limit = _number(text)
    return lambda values: values > limit


def _below(text: str) -> Callable[[np.ndarray], np.ndarray]:
    limit = _number(text)
    return lambda values: values < limit


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{text[:40]!r} is not a number")
    return value


_CHOICES: dict[str, Callable[[str], Callable[[np.ndarray], np.ndarray]]] = {
    "top": _top,
    "rank": _rank,
    "above": _above,
    "below": _below,
}
