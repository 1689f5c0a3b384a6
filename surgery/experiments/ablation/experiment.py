"""What an experiment is: conditions, each a set of removed channels and what its loss is compared with."""

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

    Masks = Mapping[int, np.ndarray]

MATCHED = (0.8, 1.25)
"""LP of a matched control relative to its selection's, between which they count as matched."""


@dataclass(frozen=True, eq=False)
class Condition:
    """One measurement.

    Attributes:
        key: What identifies its row, by the experiment's key columns; all None is the dense model.
        removed: Block index to a mask of the channels that go, bool of `Block.shape`; blocks may be left out.
        reference: What its loss is compared with, an earlier condition of the experiment; None for the dense model.
        extra: More columns of its row.
    """

    key: Mapping[str, Any]
    removed: Masks
    reference: Condition | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Experiment:
    """Conditions to measure one after the other.

    Attributes:
        name: As on the command line.
        key: Columns that identify a row.
        groups: Those of them that a summary keeps apart; it averages over the others.
        conditions: In the order of their measurement, references before what they are compared with.
        identity: Options that all rows have in common, JSON-ready.
        means: Block index to what stands in for removed channels; None is 0.
        extra: Columns of the conditions' `extra`.
        conclude: Makes more columns of a finished row, by the names in ``concluded``.
        summarise: What the rows say together, JSON-ready; None for means by ``groups``.
        warnings: What the user should know.
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
        """The model as it is."""
        return Condition(dict.fromkeys(self.key), {}, None, dict.fromkeys(self.extra))


@dataclass(frozen=True)
class Scope:
    """Layers in which channels go at once, and what rows call them."""

    name: str
    layers: frozenset[int]

    def of(self, masks: Masks, atlas: Atlas) -> dict[int, np.ndarray]:
        """``masks`` of the FFNs of these layers."""
        return {block.index: masks[block.index] for block in atlas.blocks if block.layer_index in self.layers}


def scopes(atlas: Atlas, layers: str | None, one_at_a_time: bool) -> tuple[Scope, ...]:
    """What to remove channels of: the chosen layers at once, or one after the other. Raises `UsageError`."""
    chosen = chosen_layers(layers, atlas)
    if one_at_a_time:
        return tuple(Scope(str(layer), frozenset({layer})) for layer in sorted(chosen))
    return (Scope(layers or "all", chosen),)


def selected(selector: str, atlas: Atlas, layers: frozenset[int]) -> tuple[str, Masks, tuple[str, ...]]:
    """The name of ``selector``, the channels it names in every FFN, and warnings.

    Raises:
        UsageError: It cannot mean anything, or names no channel of ``layers``.
        AtlasError: The atlas lacks the metric.
    """
    masks, warnings = select(selector, atlas)
    name = file_name(selector)
    if not any(masks[block.index].any() for block in atlas.blocks if block.layer_index in layers):
        raise UsageError(f"{name} names no channel of the layers that are ablated", hint="select others, or change --layers")
    return name, masks, warnings


def masses(atlas: Atlas) -> dict[int, np.ndarray]:
    """Block index to its channels' LP in nats per token of the model: an expert's is weighted by the tokens it gets."""
    record = atlas.calibration
    tokens = record.sequences * record.seq_len
    return {block.index: lp_mass(stack, block) / tokens for block, stack in atlas.rows()}


def total(masks: Masks, of: Masks | None = None) -> float:
    """Sum over the channels that ``masks`` mark: of ``of``, or their number."""
    return float(sum((mask if of is None else of[index][mask]).sum() for index, mask in masks.items()))


def mismatch(selection: Masks, control: Masks, mass: Masks, what: str) -> tuple[str, ...]:
    """A warning where ``control`` is not matched in LP, as nothing can be with the largest."""
    wanted, found = total(selection, mass), total(control, mass)
    if wanted <= 0 or MATCHED[0] <= found / wanted <= MATCHED[1]:
        return ()
    return (f"{what}: its LP-matched control holds {found / wanted:.3g} times its LP; no other channels are nearer",)
