"""The content of a partial atlas, which an unfinished build leaves and continues from.

The file is a valid atlas of the sequences measured so far, with status ``partial``. The pass needs more than readers do to
continue bit for bit; that lies in the extension groups ``x_chanfmt/<stack>`` and ``x_chanfmt/resume``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra import labels, metrics
from chanfmt.base.errors import AtlasError, UsageError
from chanfmt.building.input_sums import POWER, TOKENS
from chanfmt.building.statistics import CHANCE, REDUCED
from chanfmt.format import columns, schema
from chanfmt.format.reader import Atlas
from chanfmt.format.records import ExtensionGroup, ExtensionVariable
from chanfmt.format.unit import unit_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chanfmt.format.records import AtlasContent, Block, LabelSettings, ProducerRecord, StackData

OWNER = schema.RESUME_EXTENSION
RESUME = f"{OWNER}/resume"
LAYOUT = 4
"""Version of the content of the extension groups."""

REQUEST: dict[str, str] = {
    "fingerprint": "the model's weights",
    "config_sha256": "the model's config.json",
    "dtype": "--dtype",
    "memory": "--memory",
    "metric_definition": "the definition of the metrics",
    "loss_definition": "the loss",
    "source": "--calib",
    "revision": "the calibration text",
    "seq_len": "--seq-len",
    "sequences": "the number of sequences",
    "seed": "--seed",
    "sequences_sha256": "the calibration sequences",
    "special_tokens": "the set of special tokens around a sequence (--bos)",
    "columns": "--columns",
    "rho": "--rho",
    "eta": "--eta",
    "support_size": "--support",
    "alpha": "--alpha",
    "gamma": "--gamma",
    "redundancy_top_k": "redundancy_top_k",
    "score": "score",
    "ties": "ties",
}
"""Attributes of ``x_chanfmt/resume`` that must be the same to continue, with their names in messages."""

NONE_ADDED = "none"
"""Value of ``special_tokens`` if there are none and the tokenizer adds none. Older partial atlases do not state it."""
_UNSTATED = {"special_tokens": NONE_ADDED, "columns": columns.NO_GROUPS}
"""Values of `REQUEST` that older partial atlases do not state."""

ENVIRONMENT: dict[str, str] = {
    "chanfmt": "chanfmt",
    "torch": "torch",
    "transformers": "transformers",
    "threads": "the number of threads",
    "hardware": "the hardware",
}
"""Attributes of ``x_chanfmt/resume`` that may change the last bits of a sum, with their names in messages."""

_STACK_STATE = (*schema.STRIPPED, "tokens_split")
_CROSS = ("layer", "channel", "candidate")
_EXTRA_STATE: dict[str, tuple[tuple[str, ...], str, str]] = {
    "read_power": (("layer", "read_input"), "sum over tokens of the reads' squared input", "1"),
    "candidates": (("layer", "candidate"), "channels that redundancy is accumulated for", "1"),
    "real_count": (("layer",), "tokens behind the cross moments", "1"),
    "real_cross": (_CROSS, "sum over tokens of q of a channel times q of a candidate", "nats2"),
    "real_channel": (("layer", "moment", "channel"), "sums of q and q^2 of the channels", "1"),
    "real_other": (("layer", "moment", "candidate"), "sums of q and q^2 of the candidates", "1"),
    "null_count": (("layer",), "tokens behind the cross moments of the null", "1"),
    "null_cross": (_CROSS, "the same with the candidates of the sequence before", "nats2"),
    "null_channel": (("layer", "moment", "channel"), "sums of q and q^2 of the channels in the null", "1"),
    "null_other": (("layer", "moment", "candidate"), "sums of q and q^2 of the candidates in the null", "1"),
    "chance_cross": (_CROSS, "the same with the candidates at other positions of the sequence before", "nats2"),
    "offsets_drawn": (("layer",), "sequences of the null with other positions", "1"),
    CHANCE: (
        ("layer", "channel"),
        "redundancy of a finished FFN against its supernodes in other sequences and positions",
        "nats",
    ),
    "last": (("layer", "position", "candidate"), "q of the candidates in the last sequence", "nats"),
    "last_total": (("layer", "candidate"), "sum of q of the candidates over the last sequence", "nats"),
    "last_q2": (("layer", "candidate"), "sum of q^2 of the candidates over the last sequence", "nats2"),
    "column_peak": (("layer", "channel"), "largest |u| and its row", "1"),
    "column_drivers": (("layer", "driver", "channel"), "largest values of u and their rows", "1"),
    "column_first": (("layer", "moment", "channel"), "sums of u^2 and q^2 over first positions", "1"),
    "column_delimiter": (("layer", "moment", "channel"), "sums of u^2 and q^2 over delimiters", "1"),
    "column_active": (("layer", "source", "channel"), "tokens with u > 0 in each source, and without a source", "1"),
    "column_tallies": (("layer", "tally"), "tokens of each kind that columns tell apart", "1"),
    POWER: (("layer", "map", "map_input"), "sum over tokens of the squared input of another map of the block", "1"),
    TOKENS: (("layer", "map"), "tokens that reached the map", "1"),
}
"""Arrays of ``x_chanfmt/<stack>``: dimensions, long name, units."""


@dataclass(frozen=True)
class StreamState:
    """The state of a streamed pass between two blocks.

    Attributes:
        block: The first finished block. All blocks behind it are finished too.
        gradient_sha256: SHA-256 of the file with the gradient of the loss by the input of that block, hexadecimal.
    """

    block: int
    gradient_sha256: str


@dataclass(frozen=True)
class PassState:
    """The state of a pass between two batches.

    Attributes:
        sequences: Number of sequences measured: the first ones in canonical order.
        batch_size: Sequences in a batch.
        loss: Summed loss of the measured sequences, nats.
        ffns: `FFNStatistics.state` of every FFN, in model order; in a streamed pass, of the finished FFNs, which are the last.
        stream: The state of a streamed pass; None for a pass in memory.
    """

    sequences: int
    batch_size: int
    loss: float
    ffns: list[Mapping[str, np.ndarray]]
    stream: StreamState | None = None


@dataclass(frozen=True)
class PartialAtlas:
    """A partial atlas, as a build continues from it.

    Attributes:
        request: Values of `REQUEST`.
        environment: Values of `ENVIRONMENT`.
        state: The state of the pass.
        producer: The record of the runs so far: seconds, command, history.
        modules: Name of the module and number of channels of every FFN, in model order.
    """

    request: Mapping[str, Any]
    environment: Mapping[str, Any]
    state: PassState
    producer: ProducerRecord
    modules: tuple[tuple[str, int], ...]


def sequences_digest(sha256: Sequence[str]) -> str:
    """One SHA-256 for a list of sequences, given by theirs; hexadecimal."""
    return hashlib.sha256("\n".join(sha256).encode()).hexdigest()


def partial_variables(state: Mapping[str, np.ndarray], settings: LabelSettings) -> dict[str, np.ndarray]:
    """The arrays of one FFN in a partial atlas, without the layer dimension: sums, metrics derived from them, supernodes.

    Connectivity comes last in a build, so there is no halo yet.
    """
    tokens = np.asarray(state["tokens_split"]).sum(axis=0, dtype=np.int64)
    variables = {name: state[name] for name in _STACK_STATE} | {"tokens": tokens}
    variables |= metrics.derive_metrics(variables, tokens) | {name: state[name] for name in REDUCED if name in state}
    score = variables[settings.score]
    label = [labels.label_ffn(row, None, None, settings)[0] for row in unit_rows(score)]
    variables["label"] = np.reshape(label, score.shape)
    return variables


def extensions(
    state: PassState,
    blocks: Sequence[Block],
    stacks: Sequence[StackData],
    request: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> tuple[ExtensionGroup, ...]:
    """The extension groups that `read_partial` needs besides the atlas itself."""
    groups = []
    for stack in stacks:
        members = [state.ffns[block.index] for block in blocks if block.stack == stack.name]
        lengths: dict[str, int] = {}
        variables = []
        for name, (dimensions, long_name, units) in _EXTRA_STATE.items():
            if name not in members[0]:
                continue
            values = _stack_padded([member[name] for member in members])
            if not values.size:
                continue
            if stack.n_experts and name not in (POWER, TOKENS):
                dimensions = (dimensions[0], "expert", *dimensions[1:])
            lengths |= dict(zip(dimensions, values.shape, strict=True))
            variables.append(ExtensionVariable(name, dimensions, values, long_name, units, "drop"))
        indices = tuple(
            ExtensionVariable(
                name,
                (name,),
                np.arange(length, dtype=np.int32) if name != "layer" else stack.layers,
                f"{name.replace('_', ' ')} index",
                "1",
                "",
            )
            for name, length in lengths.items()
        )
        groups.append(ExtensionGroup(f"{OWNER}/{stack.name}", {}, (*indices, *variables)))
    groups.append(
        ExtensionGroup(
            RESUME,
            {
                "layout": LAYOUT,
                "batch_size": state.batch_size,
                "loss": state.loss,
                **{name: request[name] for name in REQUEST},
                **{name: environment[name] for name in ENVIRONMENT},
                **({"block": state.stream.block, "gradient_sha256": state.stream.gradient_sha256} if state.stream else {}),
            },
        )
    )
    return tuple(groups)


def read_partial(path: Path) -> PartialAtlas:
    """Read the partial atlas ``path`` whole and check its digest.

    Raises:
        UsageError: The file is from an older version.
        AtlasError: The file is damaged, is not a partial atlas, or is from a newer version.
    """
    with Atlas.open(path, verify=True) as atlas:
        content = atlas.content()
    groups = {group.path: group for group in content.extensions}
    try:
        attributes = groups[RESUME].attributes
        if content.status == "partial" and int(attributes["layout"]) < LAYOUT:
            raise UsageError(
                f"{path} was begun by an older chanfmt, which measured less",
                hint="finish it with the chanfmt that began it, or leave out --resume to start over",
            )
        if content.status != "partial" or attributes["layout"] != LAYOUT:
            raise AtlasError(f"{path} was written by another version of chanfmt")
        ffns: list[Mapping[str, np.ndarray]] = [_ffn_state(content, groups, block) for block in content.blocks]
        stream = StreamState(int(attributes["block"]), str(attributes["gradient_sha256"])) if "block" in attributes else None
        return PartialAtlas(
            {name: _asked(name, attributes) for name in REQUEST},
            {name: attributes[name] for name in ENVIRONMENT},
            PassState(content.calibration.sequences, int(attributes["batch_size"]), float(attributes["loss"]), ffns, stream),
            content.producer,
            tuple((block.module, block.n_channels) for block in content.blocks),
        )
    except (KeyError, IndexError, ValueError) as error:
        raise AtlasError(f"{path} is not a partial atlas of a build: it lacks {error}") from None


def order_left(path: Path) -> str | None:
    """The order of the unfinished build that left ``path``, as ``--memory`` names it; None if the file does not say."""
    try:
        with Atlas.open(path) as atlas:
            return str(_asked("memory", atlas.extension_attributes(RESUME)))
    except (AtlasError, KeyError):
        return None


def is_partial(path: Path) -> bool:
    """Whether ``path`` can be opened and is a partial atlas."""
    try:
        with Atlas.open(path) as atlas:
            return atlas.status == "partial"
    except AtlasError:
        return False


def _asked(name: str, attributes: Mapping[str, Any]) -> Any:
    """The value of ``name``, one of `REQUEST`, in the attributes of a partial atlas."""
    if name == "memory" and name not in attributes:
        return {"yes": "stream", "no": "whole"}[attributes["stream"]]
    return attributes.get(name, _UNSTATED[name]) if name in _UNSTATED else attributes[name]


def _ffn_state(content: AtlasContent, groups: Mapping[str, ExtensionGroup], block: Block) -> dict[str, np.ndarray]:
    stack = next(stack for stack in content.stacks if stack.name == block.stack)
    state = {}
    for name in (*_STACK_STATE, *(name for name in REDUCED if name in stack.variables)):
        axis = schema.STACK_VARIABLE_BY_NAME[name].dimensions.index("layer")
        state[name] = np.take(stack.variables[name], block.row, axis)
    extra = {variable.name: variable.values for variable in groups[f"{OWNER}/{stack.name}"].variables}
    return state | {name: extra[name][block.row] for name in _EXTRA_STATE if name in extra}


def _stack_padded(rows: list[np.ndarray]) -> np.ndarray:
    """Stack rows of one stack. Rows are padded, because FFNs of equal width may have reads of different input width."""
    shape = np.max([np.shape(row) for row in rows], axis=0).astype(int)
    result = np.zeros((len(rows), *shape), dtype=np.asarray(rows[0]).dtype)
    for index, row in enumerate(rows):
        result[index, ...][tuple(slice(length) for length in np.shape(row))] = row
    return result
