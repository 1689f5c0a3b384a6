"""Plain data of an atlas: model, calibration, label settings, FFN table, producer, and whole stacks in memory."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from chanfmt.base.errors import AtlasError, UsageError
from chanfmt.format.show import atlas_text, short, units_text
from chanfmt.format.texts import parsed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAX_INDEX = 2**63 - 1
"""Largest index into a tensor: positions are 64-bit integers."""


@dataclass(frozen=True)
class LabelSettings:
    """Parameters of the labels (paper definitions 1 and 2, equation 10)."""

    rho: float = field(default=0.01, metadata={"help": "share of channels that are supernodes"})
    eta: float = field(default=0.10, metadata={"help": "share of the other channels that are halo"})
    support_size: int = field(default=256, metadata={"help": "residual dimensions in the write support", "flag": "--support"})
    alpha: float = field(default=0.2, metadata={"help": "floor of the protection factor"})
    gamma: float = field(default=8.0, metadata={"help": "exponent of the protection factor"})
    redundancy_top_k: int = 5
    score: str = "lp"
    ties: str = "lowest index"

    def check(self) -> None:
        """Raise `UsageError` if a value is outside its range."""
        for name, low, high in (("rho", 0.0, 1.0), ("eta", 0.0, 1.0), ("alpha", 0.0, 1.0)):
            value = getattr(self, name)
            _check_number(name, value)
            if not low <= value <= high:
                raise UsageError(f"--{name} must lie in [{low:g}, {high:g}], not {value:g}")
        _check_number("gamma", self.gamma)
        if not 0 < self.gamma < float("inf"):
            raise UsageError(f"--gamma must be positive, not {self.gamma:g}")
        _check_number("support", self.support_size)
        if not 1 <= self.support_size < 2**31:
            raise UsageError(f"--support must be at least 1 and below 2^31, not {self.support_size}")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, Real):
        raise UsageError(f"--{name} must be a number, not {value!r}")


@dataclass(frozen=True)
class ModelRecord:
    """The model that was measured (attributes of ``/model``)."""

    id: str
    revision: str
    source: str
    model_type: str
    architectures: tuple[str, ...]
    config: str = field(repr=False)
    config_sha256: str = field(repr=False)
    dtype: str
    parameters: int
    fingerprint: str


@dataclass(frozen=True)
class Contribution:
    """One build's share of the calibration tokens: the merge key."""

    id: str
    source: str
    revision: str
    range: str
    sequences: int
    tokens: int
    producer: str
    inputs: str = ""


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids around a sequence or a text, such as BOS, or CLS and SEP.

    Attributes:
        before: Token ids at the beginning, in order.
        after: Token ids at the end, in order.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.before) + len(self.after)

    def __str__(self) -> str:
        """What sequences with these tokens do, such as ``begin with 101 and end with 102``."""
        parts = (("begin", self.before), ("end", self.after))
        told = [f"{verb} with {' '.join(map(str, ids))}" for verb, ids in parts if ids]
        return " and ".join(told) or "begin and end without special tokens"

    def to_json(self) -> str:
        """The text of the attributes ``special_tokens`` and ``tokenizer_special_tokens``."""
        return json.dumps({"before": list(self.before), "after": list(self.after)})

    @staticmethod
    def from_json(text: str, where: str) -> SpecialTokens:
        """Parse an attribute at the path ``where``. Raises `AtlasError` if it is not what `to_json` gives (E110)."""
        found = parsed(text, SpecialTokens, where)
        if any(not 0 <= token < 2**31 for token in (*found.before, *found.after)):
            raise AtlasError(f"{where} holds a number that is not a token id", code="E110", where=where)
        return found


NO_SPECIAL_TOKENS = SpecialTokens((), ())
"""No tokens around a sequence or a text."""


@dataclass(frozen=True)
class CalibrationRecord:
    """The calibration data that the model was measured on (``/calibration``).

    ``token_ids`` has shape (sequence, position), int32; None if it was not stored. ``sequence_sha256`` is
    always stored. ``split_of`` and ``source_of`` have shape (sequence,). ``special_tokens`` are around every sequence, and
    ``tokenizer_special_tokens`` are those that the tokenizer puts around a text; both are None if the atlas does not state
    them.
    """

    loss: str
    metric_definition: str
    tokenizer: str
    seq_len: int
    seed: int
    mean_loss: float
    sequence_sha256: tuple[str, ...] = field(repr=False)
    source_of: np.ndarray = field(repr=False)
    split_of: np.ndarray = field(repr=False)
    contributions: tuple[Contribution, ...]
    token_ids: np.ndarray | None = field(default=None, repr=False)
    special_tokens: SpecialTokens | None = None
    tokenizer_special_tokens: SpecialTokens | None = None

    @property
    def sequences(self) -> int:
        return len(self.sequence_sha256)

    @property
    def tokens(self) -> int:
        return self.sequences * self.seq_len

    @property
    def ends(self) -> str:
        """What the sequences do at their ends, such as ``begin with 2``; of an older atlas, that it does not say."""
        return "may begin anywhere in a text" if self.special_tokens is None else str(self.special_tokens)

    @property
    def ends_note(self) -> str:
        """`ends` after a semicolon, for a description of the text; empty if there are no special tokens."""
        return f"; sequences {self.ends}" if self.special_tokens else ""

    def begins_like(self, other: CalibrationRecord) -> bool:
        """Whether the sequences of both begin and end alike (spec section "Merging").

        The sequences of an older atlas do not begin as the tokenizer begins a text. If the tokenizer puts nothing around a
        text, this makes no difference.
        """
        stated = [(record.special_tokens, record.tokenizer_special_tokens) for record in (self, other)]
        if None in stated[0] or None in stated[1]:
            return all(value is None or not value for pair in stated for value in pair)
        return stated[0] == stated[1]


READ_ROLES = ("gate", "up")
"""Roles of the weights that read the residual stream (see `TensorSlice`)."""


@dataclass(frozen=True)
class TensorSlice:
    """Where the weights or biases of one role of an FFN lie in the checkpoint.

    Attributes:
        role: ``write``, ``up``, ``gate``, or one of these with ``_bias``.
        tensor: Name in the checkpoint files.
        parameter: Name of the parameter in the loaded model.
        axis: Axis that runs over channels; None for a bias without such an axis.
        start, stop, step: Channel i is at index ``start + i * step`` of that axis.
        index: Index on the tensor's first axis that selects one expert; None if the tensor has no such axis.
    """

    role: str
    tensor: str
    parameter: str
    axis: int | None
    start: int = 0
    stop: int = 0
    step: int = 1
    index: int | None = None

    def indices(self, channels: np.ndarray) -> np.ndarray:
        """Positions on ``axis`` of ``channels`` (int array) in the checkpoint tensor."""
        return self.start + np.asarray(channels, dtype=np.int64) * self.step


class StoredSlices(Sequence[TensorSlice]):
    """The slices that a file's ``tensors`` text lists. The text is parsed at the first use.

    A model with many experts has tens of thousands of slices, and most readers of an atlas do not need them.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    @functools.cached_property
    def _slices(self) -> tuple[TensorSlice, ...]:
        return Block.tensors_from_json(self._text)

    @overload
    def __getitem__(self, index: int) -> TensorSlice: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TensorSlice]: ...
    def __getitem__(self, index: int | slice) -> TensorSlice | Sequence[TensorSlice]:
        return self._slices[index]

    def __len__(self) -> int:
        return len(self._slices)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._slices == tuple(other)

    def __hash__(self) -> int:
        return hash(self._slices)


@dataclass(frozen=True, repr=False)
class Block:
    """One FFN of the model: where it lies in the model, in the atlas and in the checkpoint.

    Attributes:
        width_field: Config field that sets the width, dotted, with the position in brackets if the field holds a list; empty
            if no field sets it alone; None if the atlas does not say.
        width_factor: Channels for each unit of the integer that all FFNs with the same field share; 0 without a field.
        channel_parameters: Parameters of one channel in the checkpoint (of one expert); 0 if the atlas does not say.
    """

    index: int
    layer_index: int
    place: str
    module: str
    stack: str
    row: int
    n_channels: int
    n_experts: int
    tensors: Sequence[TensorSlice]
    width_field: str | None = None
    width_factor: int = 0
    channel_parameters: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one value per channel: (channels,), or (expert, channels) if the FFN has experts."""
        return (self.n_experts, self.n_channels) if self.n_experts else (self.n_channels,)

    @property
    def experts(self) -> Sequence[int | None]:
        """Numbers of its experts; one None for a dense FFN."""
        return range(self.n_experts) if self.n_experts else (None,)

    def __repr__(self) -> str:
        return f"<Block {self.index}: layer {self.layer_index}, {short(self.module)!r}, {units_text(self.shape)} channels>"

    def tensors_json(self) -> str:
        rows = [dataclasses.asdict(tensor) for tensor in self.tensors]
        for row in rows:
            if row["index"] is None:
                del row["index"]
        return json.dumps(rows, separators=(",", ":"))

    @staticmethod
    def tensors_from_json(text: str) -> tuple[TensorSlice, ...]:
        """Parse the ``tensors`` column; keys of a newer minor version are passed over.

        Raises:
            AtlasError: Not a JSON list of slices (E110), or a slice of impossible numbers (E204).
        """
        slices = parsed(text, tuple[TensorSlice, ...], "/block/tensors")
        for item in slices:
            if not (
                0 <= item.start <= item.stop <= MAX_INDEX
                and 1 <= item.step <= MAX_INDEX
                and (item.axis is None or 0 <= item.axis <= 3)
                and (item.index is None or 0 <= item.index <= MAX_INDEX)
            ):
                raise AtlasError("/block/tensors holds a slice that cannot be", code="E204", where="/block/tensors")
        return slices


def widths_complaint(
    channels: Sequence[int] | np.ndarray,
    fields: Sequence[str] | np.ndarray | None,
    factors: Sequence[int] | np.ndarray | None,
    parameters: Sequence[int] | np.ndarray | None,
) -> str:
    """Complaint about the columns that say what sets the widths (spec section "FFNs"); empty if they are right.

    Args:
        channels: ``n_channels``.
        fields, factors, parameters: ``width_field``, ``width_factor`` and ``channel_parameters``; None for a missing column.
    """
    if (fields is None) != (factors is None):
        return "columns width_field and width_factor do not come together"
    for row, count in enumerate(() if parameters is None else parameters):
        if count < 1:
            return f"row {row} has {count} parameters for each channel"
    units: dict[str, int] = {}
    for row, (width, name, factor) in enumerate(
        zip(channels, () if fields is None else fields, () if factors is None else factors, strict=False)
    ):
        if not name and factor != 0:
            return f"row {row} has the width factor {factor} and no width field"
        if name and (factor < 1 or width % factor):
            return f"row {row} has {width} channels, which are not a multiple of its width factor {factor}"
        if name and units.setdefault(name, int(width) // int(factor)) != width // factor:
            return f"row {row} disagrees with an earlier row about {short(name)}"
    return ""


DEVICE_PEAK = "device_peak_memory_bytes"
"""Key in the line of the history that a build on a GPU adds."""
MEMORY_PREDICTION = "memory_prediction"
"""Key in the line of the history that says which batch a build chose, and what was predicted for it."""


@dataclass(frozen=True)
class ProducerRecord:
    """Program, hardware and commands that made the file (``/producer``)."""

    versions: Mapping[str, str]
    command: str
    hardware: str
    seconds: float
    peak_memory_bytes: int
    history: tuple[Mapping[str, Any], ...] = ()

    @property
    def device_peak_memory_bytes(self) -> int | None:
        """Most bytes that a build allocated on one GPU, from ``history``; None if no build recorded it."""
        found = [line.get(DEVICE_PEAK) for line in self.history]
        return max((value for value in found if isinstance(value, int)), default=None)

    def commands(self) -> tuple[str, ...]:
        """The command lines that made the file, in order."""
        return (self.command, *(str(line.get("command", "")) for line in self.history))


class Stacked:
    """The arrays ``name`` of ``rows``, stacked along ``axis``. Iterate over them, so that only one must be in memory."""

    def __init__(self, rows: Sequence[Mapping[str, np.ndarray]], name: str, axis: int) -> None:
        self._rows = rows
        self._name = name
        self.axis = axis
        one = np.shape(rows[0][name])
        self.shape = (*one[:axis], len(rows), *one[axis:])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (row[self._name] for row in self._rows)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.stack(list(self), axis=self.axis).astype(dtype)


@dataclass(frozen=True)
class StackData:
    """FFNs of one kind, place and width.

    Attributes:
        name: Group name below ``/stacks``.
        kind: ``dense``, ``experts`` or ``shared``.
        layers: Layer index of every row, int32 (layer,).
        variables: Name to array or `Stacked`, dimensions per `chanfmt.format.schema.STACK_VARIABLES`.
        supports: Write support sizes that ``connectivity_at`` holds, ascending.
    """

    name: str
    kind: str
    gated: bool
    activation: str
    layers: np.ndarray
    n_channels: int
    n_experts: int
    splits: int
    variables: Mapping[str, Any]
    supports: tuple[int, ...] = ()


@dataclass(frozen=True)
class ExtensionVariable:
    """One array of an extension.

    Attributes:
        dimensions: Dimension names, slowest first; (name,) makes it the dimension's own values.
        values: Array of f4, f8, i4, i8 or u1, or a list of texts.
        merge: One of `chanfmt.format.schema.EXTENSION_MERGE_RULES`; empty for a dimension's own values.
    """

    name: str
    dimensions: tuple[str, ...]
    values: Any
    long_name: str
    units: str
    merge: str


@dataclass(frozen=True)
class ExtensionGroup:
    """A group that another program put into the file (spec section "Extensions").

    Attributes:
        path: ``x_<owner>`` or ``x_<owner>/<name>``. If the name is the name of a stack, the arrays belong to that stack.
        attributes: Texts and numbers.
    """

    path: str
    attributes: Mapping[str, str | int | float] = field(default_factory=dict)
    variables: tuple[ExtensionVariable, ...] = ()


@dataclass(frozen=True, repr=False)
class AtlasContent:
    """A whole atlas in memory; the writer takes it.

    Attributes:
        core_rho: Share of channels in the core that connectivity and redundancy refer to. It differs from
            ``labels.rho`` in an atlas that was relabelled without its model.
        dropped: Variables that are left out because they could not be merged or computed again.
    """

    title: str
    model: ModelRecord
    calibration: CalibrationRecord
    labels: LabelSettings
    core_rho: float
    blocks: tuple[Block, ...]
    stacks: tuple[StackData, ...]
    producer: ProducerRecord
    status: str = "complete"
    dropped: tuple[str, ...] = ()
    extensions: tuple[ExtensionGroup, ...] = ()

    def __repr__(self) -> str:
        return f"<AtlasContent: {atlas_text(self.model.id, (block.shape for block in self.blocks), self.status)}>"
