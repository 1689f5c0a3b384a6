"""Find the config fields that hold FFN widths by trial, so that no table of models must be kept up to date.

A candidate is a field that equals a width, a list that holds widths, an unset field, or a divisor or a multiple of a width.
The field is doubled, the stock model is rebuilt on the meta device, and *all* shapes are compared. The field is right if it
changes FFNs and nothing else. A field may hold several widths: DeepSeek's ``moe_intermediate_size`` is the width of the
routed experts, and the width of the shared experts is a multiple of it.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from chanfmt.base.errors import ModelError
from chanfmt.models.stock import Shapes, meta_shapes, meta_ties, parse_config

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chanfmt.format.records import TensorSlice
    from chanfmt.models.safetensors import CheckpointIndex

FieldPath = tuple[str, ...]

_LIKELY_WIDTH = ("inner", "inter", "ffn", "ff", "mlp", "feed")
_LIKELY_RATIO = ("ratio", "expansion", "mult", "factor")
_MULTIPLES = (2, 3, 4)
"""Multiples of an FFN's width that a field may hold: gate and up together, for example."""


class PlacedFFN(Protocol):
    """An FFN with its place in the model and in the checkpoint: an atlas's, a pruning plan's, or a build's."""

    @property
    def layer_index(self) -> int: ...
    @property
    def n_channels(self) -> int: ...
    @property
    def n_experts(self) -> int: ...
    @property
    def tensors(self) -> Sequence[TensorSlice]: ...


@dataclass(frozen=True)
class Placed:
    """A `PlacedFFN` that is nothing else."""

    layer_index: int
    n_channels: int
    n_experts: int
    tensors: Sequence[TensorSlice]


@dataclass(frozen=True)
class WidthField:
    """A config field that sets the width of an FFN: the width is ``factor`` times one integer, which the field stands for.

    All FFNs with the same path and place share that integer. It is ``units`` now. The field holds ``before`` now, and the
    same multiple of the integer after a change.

    Attributes:
        path: Names that lead to the field.
        place: Position of the FFN's width in the field if the field holds one width for each layer; otherwise None.
        factor: Channels for each unit of the shared integer.
        units: The shared integer now.
        before: Value of the field now (of the element at ``place`` if there is one); None if it is unset.
        layers: Length of the list that the field may hold; 0 if it holds one number.
    """

    path: FieldPath
    place: int | None
    factor: int
    units: int
    before: float | None
    layers: int = 0

    @property
    def name(self) -> str:
        """The field as an atlas names it: dotted, with the position in the list if the field holds a list."""
        return ".".join(self.path) + ("" if self.place is None else f"[{self.place}]")

    def value_at(self, units: int) -> float:
        """Value of the field such that the width is ``units`` times the factor."""
        if self.before is None:
            return units
        value = self.before * units / self.units
        return int(value) if isinstance(self.before, int) and value.is_integer() else value


def width_fields(config: dict[str, Any], ffns: Sequence[PlacedFFN]) -> list[WidthField | None]:
    """The config field that sets the width of each of ``ffns``; None for an FFN whose width no field sets alone.

    Args:
        config: Content of ``config.json``.

    Raises:
        ModelError: The stock class of ``config`` cannot be built, or lacks a parameter of an FFN.
    """
    before = meta_shapes(config)
    return _Search(config, before, ffns).run()


def channel_parameters(ffn: PlacedFFN, index: CheckpointIndex) -> int:
    """Parameters that one channel of ``ffn`` has in the checkpoint: its rows and biases in the reads, its write vector."""
    total = 0
    for item in ffn.tensors:
        entry = index.tensors.get(item.tensor)
        if item.axis is None or entry is None or item.axis >= len(entry.shape):
            continue
        one = entry.elements // max(1, entry.shape[item.axis])
        total += one if item.index is None else one // max(1, entry.shape[0])
    return total // max(1, ffn.n_experts)


class _Search:
    """One search for the fields of a model."""

    def __init__(self, config: dict[str, Any], before: Shapes, ffns: Sequence[PlacedFFN]) -> None:
        self.config = config
        self.before = before
        self.ffns = ffns
        self.fields = dict(config_fields(parse_config(config).to_dict()))
        self.found: list[WidthField | None] = [None] * len(ffns)
        self.roles: list[dict[str, set[str]]] = []
        self.owners: dict[str, list[int]] = defaultdict(list)
        for number, ffn in enumerate(ffns):
            roles: dict[str, set[str]] = defaultdict(set)
            for item in ffn.tensors:
                if item.axis is not None:
                    roles[item.parameter].add(item.role)
            named = {in_model(parameter, before): found for parameter, found in roles.items()}
            self.roles.append(named)
            for name in named:
                self.owners[name].append(number)
        # An FFN that several layers share has a name in each of them.
        for names in meta_ties(config):
            owners = [number for name in names for number in self.owners.get(name, ())]
            if owners:
                self.owners |= dict.fromkeys(names, owners)

    def run(self) -> list[WidthField | None]:
        for path, value in self._candidates():
            if None not in self.found:
                break
            found = self._of_list(path, value) if isinstance(value, list) else self._of_number(path, value)
            for number, field in found.items():
                self.found[number] = field
        return self.found

    def _candidates(self) -> Iterator[tuple[FieldPath, Any]]:
        """Fields to try, with their values, likely ones first."""
        widths = {ffn.n_channels for ffn in self.ffns}
        order: tuple[tuple[str, ...], ...] = (_LIKELY_WIDTH, ())
        for words in order:
            for path, value in self.fields.items():
                if _likely(path, words) and type(value) is int and value in widths:
                    yield path, value
        for path, value in self.fields.items():
            if isinstance(value, list) and value and all(type(item) is int for item in value) and set(value) & widths:
                yield path, value
        # An unset field stands for a multiple of another width.
        for words in order:
            for path, value in self.fields.items():
                if value is None and _likely(path, words):
                    yield path, None
        wholes = {width * multiple for width in widths for multiple in _MULTIPLES}
        numbers = [
            (path, value)
            for path, value in self.fields.items()
            if type(value) in (int, float)
            and math.isfinite(value)
            and value > 0
            and value not in widths
            and (value in wholes or any((width / value).is_integer() for width in widths))
        ]
        for words in (_LIKELY_RATIO, *order):
            yield from (found for found in numbers if _likely(found[0], words))

    def _of_number(self, path: FieldPath, value: float | None) -> dict[int, WidthField]:
        """The FFNs whose width the number at ``path`` sets; empty if it sets none, or anything else."""
        if value is None:
            return self._of_unset(path)
        trials: tuple[float, ...] = (2 * value - 1, 2 * value)
        if value not in {ffn.n_channels for ffn in self.ffns}:
            # A ratio may be any number if a float does what it should.
            trials = (value * 1.5, *trials)
        for trial in trials:
            moved = self._moved({path: trial})
            if not moved:
                continue
            if not all(self._proportional(number, found, trial / value) for number, found in moved.items()):
                continue
            old = [self.ffns[number].n_channels for number in moved]
            units = math.gcd(*old) if isinstance(trial, float) else math.gcd(int(value), *old)
            factors = {number: self.ffns[number].n_channels // units for number in moved}
            listed = self._per_layer(path, value, moved) if set(old) == {value} else 0
            return {
                number: WidthField(path, self.ffns[number].layer_index if listed else None, factor, units, value, listed)
                for number, factor in factors.items()
            }
        return {}

    def _of_unset(self, path: FieldPath) -> dict[int, WidthField]:
        """The FFNs whose width the unset field at ``path`` sets, if it sets one width and nothing else."""
        trial = 2 * max(self.ffns[number].n_channels for number in self._open()) - 1
        moved = self._moved({path: trial})
        old = {self.ffns[number].n_channels for number in moved}
        if len(old) != 1 or not all(trial in found for found in moved.values()):
            return {}
        return {number: WidthField(path, None, 1, next(iter(old)), None) for number in moved}

    def _per_layer(self, path: FieldPath, value: float, moved: Mapping[int, set[int]]) -> int:
        """The length of the list of widths that the field at ``path`` takes in place of one number; 0 if it takes none."""
        layers = self.fields.get((*path[:-1], "num_hidden_layers"))
        if type(layers) is not int or not all(0 <= self.ffns[number].layer_index < layers for number in moved):
            return 0
        trial = [2 * int(value) + place for place in range(layers)]
        found = self._moved({path: trial})
        alike = found.keys() == moved.keys() and all(
            trial[self.ffns[number].layer_index] in widths for number, widths in found.items()
        )
        return layers if alike else 0

    def _of_list(self, path: FieldPath, values: list[int]) -> dict[int, WidthField]:
        """The FFNs whose width an element of the list at ``path`` sets; empty if it sets none, or anything else."""
        trial = [2 * value + place for place, value in enumerate(values)]
        found: dict[int, WidthField] = {}
        for number, widths in self._moved({path: trial}).items():
            ffn = self.ffns[number]
            places = [place for place, value in enumerate(values) if value == ffn.n_channels and trial[place] in widths]
            if not places:
                return {}
            place = ffn.layer_index if ffn.layer_index in places else places[0]
            found[number] = WidthField(path, place, 1, ffn.n_channels, values[place], len(values))
        return found

    def _open(self) -> list[int]:
        """Numbers of the FFNs without a field so far."""
        return [number for number, field in enumerate(self.found) if field is None]

    def _proportional(self, number: int, widths: set[int], ratio: float) -> bool:
        """Whether one of ``widths`` is the old width times ``ratio``, perhaps rounded down."""
        wanted = self.ffns[number].n_channels * ratio
        return any(abs(width - wanted) < 1e-6 * wanted or width == math.floor(wanted) for width in widths)

    def _moved(self, edits: Mapping[FieldPath, Any]) -> dict[int, set[int]]:
        """FFN to the widths that it may have after ``edits``, for each FFN that changes.

        Empty if the model cannot be built, has other parameters, or if something else changes as well.
        """
        try:
            after = meta_shapes(edit_config(self.config, edits))
        except ModelError:
            return {}
        if after.keys() != self.before.keys():
            return {}
        changed = {name for name, shape in after.items() if shape != self.before[name]}
        touched = {number for name in changed for number in self.owners.get(name, ())}
        if not changed or any(name not in self.owners for name in changed):
            return {}
        found: dict[int, set[int]] = {}
        for number in touched:
            if self.found[number] is not None or not self.roles[number].keys() <= changed:
                return {}
            ffn = self.ffns[number]
            options = [
                set(_widths_after(ffn, self.before[name], after[name], len(roles))) for name, roles in self.roles[number].items()
            ]
            found[number] = set.intersection(*options)
            if not found[number]:
                return {}
        return found


def _likely(path: FieldPath, words: Sequence[str]) -> bool:
    return not words or any(word in str(path[-1]) for word in words)


def _widths_after(ffn: PlacedFFN, before: tuple[int, ...], after: tuple[int, ...], roles: int) -> Iterator[int]:
    """Widths that ``ffn`` may have if a parameter that holds so many of its roles changes from one shape to the other."""
    places = [axis for axis, (old, new) in enumerate(zip(before, after, strict=False)) if old != new]
    if len(before) != len(after) or len(places) != 1:
        return
    grown = after[places[0]] - before[places[0]]
    # One axis of the parameter may run over the channels of all experts.
    for each in {roles, roles * max(1, ffn.n_experts)}:
        if grown % each == 0:
            yield ffn.n_channels + grown // each


def in_model(parameter: str, shapes: Shapes) -> str:
    """The stock model's name of ``parameter``: with another head, names begin differently.

    Raises:
        ModelError: The stock model has no such parameter.
    """
    if parameter in shapes:
        return parameter
    found = [name for name in shapes if name.endswith(f".{parameter}") or parameter.endswith(f".{name}")]
    if len(found) != 1:
        raise ModelError(f"the model's parameter {parameter!r} does not exist in the stock class of its config")
    return found[0]


def config_fields(config: Mapping[str, Any], prefix: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """Every field of ``config`` that is not a table, with its value."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from config_fields(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def edit_config(config: dict[str, Any], edits: Mapping[FieldPath, Any]) -> dict[str, Any]:
    """A copy of ``config`` with fields set."""
    edited = copy.deepcopy(config)
    for path, value in edits.items():
        place = edited
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = value
    return edited
