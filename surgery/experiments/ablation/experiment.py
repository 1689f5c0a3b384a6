"""An experiment as data: conditions, each with its removed channels and the condition that it is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import UsageError
from surgery.planning.addresses import chosen_layers
from surgery.planning.mass import lp_mass
from surgery.planning.selectors import file_name, select

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from chanfmt.format.reader import Atlas
    from surgery.experiments.weight import Weight

    Masks = Mapping[int, np.ndarray]

MATCHED = (0.8, 1.25)
"""Bounds of the LP of a control, relative to its selection, between which the control counts as matched."""


@dataclass(frozen=True, eq=False)
class Condition:
    """One measurement.

    Attributes:
        key: The values that identify its row, by the experiment's key columns; all are None for the dense model.
        removed: Block index to a mask of the channels to remove, bool of `Block.shape`. Blocks may be left out.
        reference: The earlier condition that its loss is compared with; None for the dense model.
        extra: More columns of its row.
        weights: Weights that are set to 0.
    """

    key: Mapping[str, Any]
    removed: Masks
    reference: Condition | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[Weight, ...] = ()


@dataclass(frozen=True, eq=False)
class Experiment:
    """Conditions to measure, one after the other.

    Attributes:
        name: As on the command line.
        key: Columns that identify a row.
        groups: The key columns that the summary groups by. It averages over the other key columns.
        conditions: In the order of measurement. A reference stands before the conditions that are compared with it.
        identity: Options that all rows have in common, JSON-ready.
        means: Block index to the values that replace the activations of removed channels; None for 0.
        extra: Names of the columns in `Condition.extra`.
        concluded: Names of the columns that ``conclude`` adds.
        conclude: Computes more columns from a finished row.
        summarise: Computes the summary of the rows, JSON-ready; None for means by ``groups``.
        warnings: Warnings for the user.
    """

    name: str
    key: tuple[str, ...]
    groups: tuple[str, ...]
    conditions: tuple[Condition, ...]
    identity: Mapping[str, Any] = field(default_factory=dict)
    means: Masks | None = None
    extra: tuple[str, ...] = ()
    concluded: tuple[str, ...] = ()
    conclude: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda row: {}
    summarise: Callable[[Sequence[Mapping[str, Any]]], list[dict[str, Any]]] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def dense(self) -> Condition:
        """The condition in which nothing is removed."""
        return Condition(dict.fromkeys(self.key), {}, None, dict.fromkeys(self.extra))


@dataclass(frozen=True)
class Scope:
    """Layers whose channels are removed together, and the name of these layers in the rows."""

    name: str
    layers: frozenset[int]

    def of(self, masks: Masks, atlas: Atlas) -> dict[int, np.ndarray]:
        """The ``masks`` of the FFNs in these layers."""
        return {block.index: masks[block.index] for block in atlas.blocks if block.layer_index in self.layers}


def scopes(atlas: Atlas, layers: str | None, one_at_a_time: bool) -> tuple[Scope, ...]:
    """The chosen layers as one scope, or as one scope each. Raises `UsageError` if ``layers`` has no meaning."""
    chosen = chosen_layers(layers, atlas)
    if one_at_a_time:
        return tuple(Scope(str(layer), frozenset({layer})) for layer in sorted(chosen))
    return (Scope(layers or "all", chosen),)


def selected(selector: str, atlas: Atlas, layers: frozenset[int]) -> tuple[str, Masks, tuple[str, ...]]:
    """The name of ``selector``, a mask of the channels that it selects in every FFN, and warnings.

    Raises:
        UsageError: The selector has no meaning, or selects no channel of ``layers``.
        AtlasError: The atlas lacks the metric.
    """
    masks, warnings = select(selector, atlas)
    name = file_name(selector)
    if not any(masks[block.index].any() for block in atlas.blocks if block.layer_index in layers):
        raise UsageError(f"{name} selects no channel of the ablated layers", hint="select other channels, or change --layers")
    return name, masks, warnings


def masses(atlas: Atlas) -> dict[int, np.ndarray]:
    """Block index to the LP of its channels, per token of the model. The LP of an expert is weighted by its share of the tokens."""
    record = atlas.calibration
    tokens = record.sequences * record.seq_len
    return {block.index: lp_mass(stack, block) / tokens for block, stack in atlas.rows()}


def total(masks: Masks, of: Masks | None = None) -> float:
    """Sum of ``of`` over the channels that ``masks`` select; without ``of``, the number of these channels."""
    return float(sum((mask if of is None else of[index][mask]).sum() for index, mask in masks.items()))


def mismatch(selection: Masks, control: Masks, mass: Masks, what: str) -> tuple[str, ...]:
    """A warning if ``control`` is not matched in LP. For the channels with the largest LP no match exists."""
    wanted, found = total(selection, mass), total(control, mass)
    if wanted <= 0 or MATCHED[0] <= found / wanted <= MATCHED[1]:
        return ()
    return (f"{what}: the LP-matched control has {found / wanted:.3g} times its LP; no channels with a nearer LP are left",)
