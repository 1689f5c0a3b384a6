"""What a build keeps so that a killed one can go on: an atlas of the sequences measured so far.

The file is a valid atlas with status ``partial``. What readers have no use for and the pass needs
to continue bit for bit lies in the extension groups ``x_chanfmt/<stack>`` and ``x_chanfmt/resume``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra import labels, metrics
from chanfmt.base.errors import AtlasError, ChanfmtError, UsageError
from chanfmt.base.narrate import say, warn
from chanfmt.building.statistics import REDUCED
from chanfmt.format import schema
from chanfmt.format.reader import Atlas
from chanfmt.format.records import ExtensionGroup, ExtensionVariable
from chanfmt.format.unit import unit_rows
from chanfmt.format.writer import write_atlas

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from chanfmt.building.measure import Measurement
    from chanfmt.format.records import AtlasContent, Block, LabelSettings, ProducerRecord, StackData

OWNER = schema.RESUME_EXTENSION
RESUME = f"{OWNER}/resume"
LAYOUT = 2
"""Version of what the extension groups hold."""

FIRST_SECONDS = 30.0
"""No checkpoint before that: a shorter run is sooner repeated than continued."""
SHARE = 0.02
"""Largest share of the time that checkpoints take."""
BYTES_PER_SECOND = 40e6
"""How fast the first checkpoint is taken to be written, at the least; later ones go by the one before."""

ASKED: dict[str, str] = {
    "fingerprint": "the model's weights",
    "config_sha256": "the model's config.json",
    "dtype": "--dtype",
    "stream": "--stream",
    "metric_definition": "the definition of the metrics",
    "loss_definition": "the loss",
    "source": "--calib",
    "revision": "the calibration text",
    "seq_len": "--seq-len",
    "sequences": "the number of sequences",
    "seed": "--seed",
    "sequences_sha256": "the calibration sequences",
    "rho": "--rho",
    "eta": "--eta",
    "support_size": "--support",
    "alpha": "--alpha",
    "gamma": "--gamma",
    "redundancy_top_k": "redundancy_top_k",
    "score": "score",
    "ties": "ties",
}
"""Attributes of ``x_chanfmt/resume`` that must be the same to continue, and what people call them."""

ENVIRONMENT: dict[str, str] = {
    "chanfmt": "chanfmt",
    "torch": "torch",
    "transformers": "transformers",
    "threads": "the number of threads",
    "hardware": "the hardware",
}
"""Attributes of ``x_chanfmt/resume`` that may change the last bits of a sum, and what people call them."""

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
    "last": (("layer", "position", "candidate"), "q of the candidates in the last sequence", "nats"),
    "last_total": (("layer", "candidate"), "sum of q of the candidates over the last sequence", "nats"),
    "last_q2": (("layer", "candidate"), "sum of q^2 of the candidates over the last sequence", "nats2"),
}
"""Arrays of ``x_chanfmt/<stack>``: dimensions, long name, units."""


@dataclass(frozen=True)
class StreamState:
    """Where a streamed pass stands between two blocks.

    Attributes:
        block: The first block of those that are finished, which are all from there on.
        gradient_sha256: Digest of the file that holds the gradient of the loss by what that block reads.
    """

    block: int
    gradient_sha256: str


@dataclass(frozen=True)
class PassState:
    """Where a pass stands between two batches.

    Attributes:
        sequences: Sequences measured, the first ones in canonical order.
        batch_size: Sequences in a batch.
        loss: Their summed next-token NLL, nats.
        ffns: `ChannelStatistics.state` of every FFN, in order; of a streamed pass of the last ones, which are finished.
        stream: Of a streamed pass.
    """

    sequences: int
    batch_size: int
    loss: float
    ffns: list[Mapping[str, np.ndarray]]
    stream: StreamState | None = None


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file says.

    Attributes:
        asked: Values of `ASKED`.
        environment: Values of `ENVIRONMENT`.
        producer: The sessions so far: seconds, command, history.
        modules: Module of every FFN and its channels, in order.
    """

    asked: Mapping[str, Any]
    environment: Mapping[str, Any]
    state: PassState
    producer: ProducerRecord
    modules: tuple[tuple[str, int], ...]


def sequences_digest(sha256: Sequence[str]) -> str:
    """One SHA-256 for a list of sequences, hexadecimal."""
    return hashlib.sha256("\n".join(sha256).encode()).hexdigest()


def partial_variables(state: Mapping[str, np.ndarray], settings: LabelSettings) -> dict[str, np.ndarray]:
    """What an unfinished FFN's atlas holds: sums, what follows from them, and supernodes; no layer dimension.

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
    asked: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> tuple[ExtensionGroup, ...]:
    """The groups that `read_checkpoint` needs besides the atlas itself."""
    groups = []
    for stack in stacks:
        members = [state.ffns[block.index] for block in blocks if block.stack == stack.name]
        lengths: dict[str, int] = {}
        variables = []
        for name, (dimensions, long_name, units) in _EXTRA_STATE.items():
            if name not in members[0]:
                continue
            values = _stack_padded([member[name] for member in members])
            if stack.n_experts:
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
                **{name: asked[name] for name in ASKED},
                **{name: environment[name] for name in ENVIRONMENT},
                **({"block": state.stream.block, "gradient_sha256": state.stream.gradient_sha256} if state.stream else {}),
            },
        )
    )
    return tuple(groups)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read ``path`` whole and check its digest.

    Raises:
        AtlasError: It is damaged, not a checkpoint, or one of another version.
    """
    with Atlas.open(path, verify=True) as atlas:
        content = atlas.content()
    groups = {group.path: group for group in content.extensions}
    try:
        attributes = groups[RESUME].attributes
        if content.status != "partial" or attributes["layout"] != LAYOUT:
            raise AtlasError(f"{path} was written by another version of chanfmt")
        ffns: list[Mapping[str, np.ndarray]] = [_ffn_state(content, groups, block) for block in content.blocks]
        stream = StreamState(int(attributes["block"]), str(attributes["gradient_sha256"])) if "block" in attributes else None
        return Checkpoint(
            {name: attributes[name] for name in ASKED},
            {name: attributes[name] for name in ENVIRONMENT},
            PassState(content.calibration.sequences, int(attributes["batch_size"]), float(attributes["loss"]), ffns, stream),
            content.producer,
            tuple((block.module, block.n_channels) for block in content.blocks),
        )
    except (KeyError, IndexError, ValueError) as error:
        raise AtlasError(f"{path} is no checkpoint of a build: it lacks {error}") from None


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` can be opened and is an unfinished build."""
    try:
        with Atlas.open(path) as atlas:
            return atlas.status == "partial"
    except AtlasError:
        return False


def is_finished(path: Path, output: Path) -> bool:
    """Whether the build that left the checkpoint ``path`` went on to write ``output``."""
    try:
        checkpoint = read_checkpoint(path)
        with Atlas.open(output, verify=True) as atlas:
            return (
                atlas.status == "complete"
                and atlas.model.fingerprint == checkpoint.asked["fingerprint"]
                and atlas.model.dtype == checkpoint.asked["dtype"]
                and sequences_digest(atlas.calibration.sequence_sha256) == checkpoint.asked["sequences_sha256"]
                and all(
                    getattr(atlas.labels, name) == checkpoint.asked[name]
                    for name in ("rho", "eta", "support_size", "alpha", "gamma")
                )
            )
    except AtlasError:
        return False


def set_aside(path: Path, why: str) -> None:
    """Rename a checkpoint that cannot be used, and say so. Raises `ChanfmtError` where that fails."""
    broken = path.with_name(path.name + ".broken")
    try:
        os.replace(path, broken)
    except OSError as error:
        raise ChanfmtError(f"cannot rename {path}: {error.strerror}", hint="move it away yourself") from None
    say(f"note: {why}; moved to {broken}, starting from the beginning")


def check_same(checkpoint: Checkpoint, asked: Mapping[str, Any], batch_size: int | None, path: Path) -> None:
    """Raise `UsageError` naming what is asked differently from the build that left ``checkpoint``."""
    changed = {name for name in ASKED if checkpoint.asked[name] != asked[name]}
    if changed & {"source", "revision", "seq_len", "sequences", "seed"}:
        changed.discard("sequences_sha256")
    sentences = [_difference(ASKED[name], checkpoint.asked[name], asked[name]) for name in ASKED if name in changed]
    if batch_size not in (None, checkpoint.state.batch_size):
        sentences.append(_difference("--batch-size", checkpoint.state.batch_size, batch_size))
    if sentences:
        raise UsageError(
            f"{path} cannot be continued: {'; '.join(sentences)}",
            hint="repeat the command as it was, or leave out --resume to start over",
        )


def note_environment(checkpoint: Checkpoint, environment: Mapping[str, Any]) -> None:
    """Say on stderr what may change the last bits of the result."""
    changed = [
        _difference(text, checkpoint.environment[name], environment[name])
        for name, text in ENVIRONMENT.items()
        if checkpoint.environment[name] != environment[name]
    ]
    if changed:
        say(f"note: {'; '.join(changed)}: the last bits may differ from an uninterrupted run's")


class Schedule:
    """When the next checkpoint is due: as seldom as keeps them below `SHARE` of the time.

    Args:
        every: Seconds between checkpoints instead; 0 is after every batch, infinity never.
    """

    def __init__(self, every: float | None, now: float) -> None:
        self._every = every
        self._last = now
        self._seconds_per_byte = 1 / BYTES_PER_SECOND
        self._wait = FIRST_SECONDS

    def due(self, now: float, nbytes: int) -> bool:
        """Whether ``nbytes`` should be written at ``now`` (seconds of a monotonic clock)."""
        if self._every is not None:
            return now - self._last >= self._every
        return now - self._last >= max(self._wait, nbytes * self._seconds_per_byte / SHARE)

    def tried(self, start: float, stop: float, nbytes: int) -> None:
        """``nbytes`` were written, or could not be, from ``start`` to ``stop``."""
        self._last = stop
        self._wait = (stop - start) / SHARE
        self._seconds_per_byte = (stop - start) / max(1, nbytes)


class Keeper:
    """Writes the checkpoints of one build.

    Args:
        path: The checkpoint file.
        every: See `Schedule`.
        make: What the file is to hold, of a measurement that is under way.
        wrote: Called after a checkpoint was written.
    """

    def __init__(
        self,
        path: Path,
        every: float | None,
        make: Callable[[Measurement], AtlasContent],
        wrote: Callable[[Measurement], object] = lambda measurement: None,
    ) -> None:
        self.path = path
        self._wrote = wrote
        self._schedule = Schedule(every, time.monotonic())
        self._make = make
        self._warned = False

    def due(self, measurement: Measurement) -> bool:
        """Whether it is time for a checkpoint."""
        return self._schedule.due(time.monotonic(), measurement.nbytes)

    def save(self, measurement: Measurement) -> None:
        """Write a checkpoint now. Where that fails the one before stays, and the first time it is said."""
        start = time.monotonic()
        try:
            write_atlas(self._make(measurement), self.path)
            self._wrote(measurement)
        except (ChanfmtError, OSError, MemoryError) as error:
            if not self._warned:
                text = error.message if isinstance(error, ChanfmtError) else str(error) or "out of memory"
                warn(f"no checkpoint written: {text}")
            self._warned = True
        finally:
            self._schedule.tried(start, time.monotonic(), measurement.nbytes)


@contextlib.contextmanager
def stop_requests(*, quiet: bool = False) -> Iterator[Callable[[], bool]]:
    """Hold back Ctrl-C and SIGTERM: the function it yields says whether one came. A second one acts at once.

    Sums are consistent between batches only. A signal that nobody here would turn into
    `KeyboardInterrupt` keeps its meaning.

    Args:
    """
    came: list[int] = []
    previous: dict[int, Any] = {}

    def remember(number: int, frame: Any) -> None:
        if came:
            previous[number](number, frame)
        came.append(number)
        # Not through sys.stderr, in the middle of whose own work this may be.
        with contextlib.suppress(OSError):
            if not quiet:
                os.write(2, b"\nstopping after this batch; once more stops at once\n")

    if threading.current_thread() is threading.main_thread():
        for wanted in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(wanted)
            if callable(handler):
                previous[wanted] = handler
                signal.signal(wanted, remember)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ffn_state(content: AtlasContent, groups: Mapping[str, ExtensionGroup], block: Block) -> dict[str, np.ndarray]:
    stack = next(stack for stack in content.stacks if stack.name == block.stack)
    state = {}
    for name in (*_STACK_STATE, *(name for name in REDUCED if name in stack.variables)):
        axis = schema.STACK_VARIABLE_BY_NAME[name].dimensions.index("layer")
        state[name] = np.take(stack.variables[name], block.row, axis)
    extra = {variable.name: variable.values for variable in groups[f"{OWNER}/{stack.name}"].variables}
    return state | {name: extra[name][block.row] for name in _EXTRA_STATE if name in extra}


def _stack_padded(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of one stack; reads of FFNs of equal width may still differ in the width of their input."""
    shape = np.max([np.shape(row) for row in rows], axis=0).astype(int)
    result = np.zeros((len(rows), *shape), dtype=np.asarray(rows[0]).dtype)
    for index, row in enumerate(rows):
        result[index, ...][tuple(slice(length) for length in np.shape(row))] = row
    return result


def _difference(what: str, before: Any, now: Any) -> str:
    """One sentence; digests are of no interest to people."""
    if any(isinstance(value, str) and len(value) >= 40 for value in (before, now)):
        return f"{what} changed"
    return f"{what} was {before} and is {now}"
