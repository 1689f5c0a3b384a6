"""`atlas build`: resolve, load, find, measure, label, write."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import glob
import hashlib
import itertools
import os
import platform
import resource
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from chanfmt.algebra import labels
from chanfmt.base.command_line import recorded_command
from chanfmt.base.errors import AtlasError, ChanfmtError, UsageError
from chanfmt.base.files import check_target, remove_stale
from chanfmt.base.narrate import progress_bar, say, silenced
from chanfmt.base.version import __version__
from chanfmt.building import state as checkpoint
from chanfmt.building.derive import layer_variables, stack_layers
from chanfmt.building.distributed import Group, LostProcessError, joined, processes
from chanfmt.building.given import plan_given
from chanfmt.building.loss import Loss, choose_loss
from chanfmt.building.measure import Measurement, measure
from chanfmt.building.stream import StreamedMeasurement, measure_streamed, steps
from chanfmt.data.arrays import CalibrationInputs, InputFile, draw_tokens, read_inputs
from chanfmt.data.sampled import sample_sequences
from chanfmt.data.sources import Source, contributions, draw_text, together
from chanfmt.data.text import SELF
from chanfmt.data.tokens import CalibrationTokens, canonical, check_context
from chanfmt.format import schema
from chanfmt.format.records import (
    AtlasContent,
    Block,
    CalibrationRecord,
    LabelSettings,
    ModelRecord,
    ProducerRecord,
    TensorSlice,
)
from chanfmt.format.writer import write_atlas
from chanfmt.models.find.discover import block_of, find_ffns
from chanfmt.models.load import load_model
from chanfmt.models.matrices import ffn_weights
from chanfmt.models.run import test_tokens
from chanfmt.models.stored.layout import tensor_slices
from chanfmt.models.streaming.spool import Spool
from chanfmt.models.streaming.streamed import StreamedModel, open_streamed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from chanfmt.building.options import BuildOptions
    from chanfmt.models.ffn import FFN
    from chanfmt.models.source import ModelSource


class Locate(Protocol):
    """Finds a model by what a user writes; `chanfmt.hub.locate.locate_model` is one."""

    def __call__(self, model: str, *, revision: str | None, trust_remote_code: bool) -> ModelSource: ...


@dataclass(frozen=True)
class BuildPlan:
    """Everything that is decided before the pass: the model, its FFNs, the tokens."""

    source: ModelSource
    model: Any
    ffns: list[FFN]
    slices: list[tuple[TensorSlice, ...]]
    loss: Loss
    sources: tuple[Source, ...]
    tokens: CalibrationTokens | CalibrationInputs
    unsampled: int
    """Sequences that a dry run leaves to be sampled from the model."""
    streamed: StreamedModel | None = None
    """``model`` and ``ffns`` where the weights come block by block."""

    @functools.cached_property
    def record(self) -> ModelRecord:
        """The model as the atlas states it; read once, as every checkpoint states it too."""
        config = self.source.config_text
        return ModelRecord(
            id=self.source.id,
            revision=self.source.revision,
            source=self.source.source,
            model_type=self.source.config.model_type,
            architectures=tuple(self.source.config.architectures or (type(self.model).__name__,)),
            config=config,
            config_sha256=hashlib.sha256(config.encode()).hexdigest(),
            dtype=str(next(self.model.parameters()).dtype).removeprefix("torch."),
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            fingerprint=self.source.fingerprint,
        )

    @property
    def channels(self) -> int:
        """Channels of all FFNs, those of every expert counted."""
        return sum(ffn.width * len(ffn.members) for ffn in self.ffns)

    def summary(self) -> dict[str, Any]:
        """What would be measured, for ``--dry-run``."""
        return {
            "model": self.source.id,
            "revision": self.source.revision,
            "parameters": self.record.parameters,
            "ffns": len(self.ffns),
            "channels": self.channels,
            "widths": sorted({ffn.width for ffn in self.ffns}),
            "gated": self.ffns[0].gated,
            "experts": max(ffn.experts for ffn in self.ffns),
            "write": self.ffns[0].write,
            "reads": list(dict.fromkeys(read.projection.matrix.parameter for read in self.ffns[0].members[0].reads)),
            "loss": self.loss.definition,
            "calibration": [source.name for source in self.sources],
            "sequences": len(self.tokens) + self.unsampled,
            "tokens": (len(self.tokens) + self.unsampled) * self.tokens.seq_len,
        }


def plan_build(options: BuildOptions, settings: LabelSettings, locate: Locate) -> BuildPlan:
    """Check the request, load the model and what it is calibrated on, find the FFNs. Nothing is measured or written.

    Args:
        locate: Finds the model that ``options.model`` names, see `Locate`.

    Raises:
        UsageError, ModelError: What is wrong with the request or the model.
    """
    options.check()
    settings.check()
    if not options.dry_run:
        check_target(options.path, overwrite=options.overwrite)
    source = locate(options.model, revision=options.revision, trust_remote_code=options.trust_remote_code)
    # What cannot be measured is refused before anything else is read.
    config, index = source.config, source.index
    file = None if options.inputs is None else read_inputs(options.inputs)
    if file is not None and not file.holds_tokens:
        return _plan_given(options, file, source)
    tokenizer = source.tokenizer
    shares = options.shares
    if file is not None:
        drawn = [draw_tokens(file, options.sequences, options.seq_len, options.seed, config=config, model=source.id)]
    else:
        check_context(config, options.seq_len, source.id)
        drawn = [
            draw_text(
                text,
                sequences,
                options.seq_len,
                options.seed,
                config=config,
                tokenizer=tokenizer,
                model=source.id,
            )
            for text, sequences in shares.items()
            if text != SELF
        ]
    streamed = None
    if options.stream:
        streamed = open_streamed(source, dtype=options.dtype, device=options.device)
        model, ffns = streamed.chain.model, streamed.ffns
    else:
        model = _loaded(options, source)
        ffns = find_ffns(model)
    loss = choose_loss(model, tokenizer, test_tokens(model), options.loss, causal=streamed.causal if streamed else None)
    slices = [tensor_slices(model, ffn, index) for ffn in ffns]
    if SELF in shares:
        drawn.append(_sampled(model, tokenizer, 0 if options.dry_run else shares[SELF], options, source.id))
    sources, tokens = together(drawn)
    return BuildPlan(
        source,
        model,
        ffns,
        slices,
        loss,
        sources,
        tokens,
        shares.get(SELF, 0) if options.dry_run else 0,
        streamed,
    )


def _plan_given(options: BuildOptions, file: InputFile, source: ModelSource) -> BuildPlan:
    """`plan_build` on a file of inputs that are not token sequences."""
    if options.stream:
        raise UsageError(
            f"--stream runs token sequences, and {file.name} holds {', '.join(sorted(file.arrays))}",
            hint="leave out --stream, or use --dtype bfloat16 or --device-map auto for a large model",
        )
    model = _loaded(options, source)
    given = plan_given(model, file, options.loss, options.sequences, options.seed)
    slices = [tensor_slices(model, ffn, source.index) for ffn in given.ffns]
    return BuildPlan(source, model, given.ffns, slices, given.loss, (given.source,), given.inputs, unsampled=0)


def _loaded(options: BuildOptions, source: ModelSource) -> Any:
    return load_model(
        source,
        dtype=options.dtype,
        device=options.device,
        device_map=options.device_map,
    )


def _sampled(model: Any, tokenizer: Any, sequences: int, options: BuildOptions, name: str) -> Source:
    """The source `SELF`: what the model writes."""
    total = sequences * (options.seq_len - 1)
    with progress_bar(total, "tok", "sampling") as bar:
        ids = sample_sequences(
            model, tokenizer, sequences, options.seq_len, options.seed, name=name, batch_size=options.batch, progress=bar.update
        )
    ids = canonical(ids).ids
    return Source(SELF, hashlib.sha256(ids.tobytes()).hexdigest(), len(ids), ids)


@dataclass(frozen=True)
class Session:
    """One run of the command on a build that may take several.

    Attributes:
        started: Monotonic clock at its start.
        before: What the sessions before left; None in the first.
        history: One entry per resume, this session's own included.
    """

    started: float
    before: ProducerRecord | None = None
    history: tuple[Mapping[str, Any], ...] = ()


def build(options: BuildOptions, settings: LabelSettings, locate: Locate) -> Path:
    """Measure ``options.model`` and write its atlas. Returns the path written.

    A pass that takes long is checkpointed at ``options.checkpoint``; ``options.resume`` continues from there.
    Where torchrun started several processes, all call this: they measure together, and the first writes.

    Raises:
        ChanfmtError: Anything that a user can mend. A checkpoint stays, nothing else.
        LostProcessError: Another process died; what it had measured since the last checkpoint is lost.
        KeyboardInterrupt: Ctrl-C; its text says how to continue where there is a checkpoint.
    """
    if options.stream and processes() > 1:
        raise UsageError("--stream runs in one process, and torchrun started several", hint="run it without torchrun")
    if options.device_map and processes() > 1:
        raise UsageError(
            "--device-map gives one process all GPUs, and torchrun started several",
            hint="start it without torchrun, or leave out --device-map",
        )
    there = f"{options.checkpoint} holds what was measured; continue with the same command and --resume"
    try:
        with joined(options.device) as group, contextlib.nullcontext() if group.rank == 0 else silenced():
            return _build(dataclasses.replace(options, device=group.device), settings, locate, group)
    except KeyboardInterrupt:
        if os.path.lexists(options.checkpoint):
            raise KeyboardInterrupt(there) from None
        raise
    except LostProcessError as error:
        if os.path.lexists(options.checkpoint):
            error.hint = there
        raise


def _build(options: BuildOptions, settings: LabelSettings, locate: Locate, group: Group) -> Path:
    path, kept = options.path, options.checkpoint
    group.together(lambda: _clear_way(options, locate, group))
    plan = group.together(lambda: plan_build(options, settings, locate))
    asked, environment = _asked(plan, settings, options), _environment(plan)
    _check_alike(asked, group)
    before = group.together(lambda: _resume(plan, options, asked, environment) if group.rank == 0 else None)
    say(
        f"{plan.source.id}: {len(plan.ffns)} FFNs, {plan.channels:,} channels; "
        f"{len(plan.tokens)} x {plan.tokens.seq_len} tokens of "
        f"{', '.join(source.name for source in plan.sources)}",
    )
    mixed = sorted({ffn.layer_index for ffn in plan.ffns if ffn.mixed})
    if mixed:
        say(
            f"note: in layer {', '.join(map(str, mixed))} a norm or a threshold over all channels lies between read and write: "
            "without some channels the others change",
        )
    session = _session(before)

    keeper = checkpoint.Keeper(
        kept,
        options.checkpoint_every,
        lambda measurement: assemble_partial(plan, measurement, settings, options, session, asked, environment),
        lambda measurement: _note_kept(kept, measurement),
    )
    with Spool(int(options.spool_limit * 2**30), path.absolute().parent) as spool:
        # torchrun passes signals on itself, and ends the other processes with one when one is lost.
        with checkpoint.stop_requests(quiet=group.size > 1) as stop:

            def keep(measurement: Measurement) -> None:
                wishes = group.exchange((stop(), group.rank == 0 and measurement.fresh and keeper.due(measurement)))
                stopping = any(wish for wish, _ in wishes)
                if (stopping and measurement.fresh) or wishes[0][1]:
                    measurement.collect(group)
                    if group.rank == 0:
                        keeper.save(measurement)
                if stopping:
                    # The first to leave makes torchrun end the others: not before the checkpoint is written.
                    group.exchange(None)
                    raise KeyboardInterrupt

            measurement = _measure(plan, settings, options, before.state if before else None, keep, group, spool)
        if group.rank:
            return path
        try:
            write_atlas(assemble(plan, measurement, settings, options, session), path)
        except (Exception, KeyboardInterrupt) as error:
            # What follows the pass takes seconds, the pass may have taken days.
            keeper.save(measurement)
            if isinstance(error, ChanfmtError) and os.path.lexists(kept):
                there = f"{kept} holds what was measured: mend that, then continue with the same command and --resume"
                error.hint = f"{error.hint}\n  {there}" if error.hint else there
            raise
    kept.unlink(missing_ok=True)
    _remove_gradients(kept)
    return path


def _clear_way(options: BuildOptions, locate: Locate, group: Group) -> None:
    """Remove what earlier builds left; let one process of a machine fetch or convert the model for all of it."""
    path, kept = options.path, options.checkpoint
    if group.rank == 0:
        remove_stale(path)
        remove_stale(kept)
        # Killed between publishing the atlas and removing the checkpoint.
        if os.path.lexists(kept) and path.is_file() and checkpoint.is_finished(kept, path):
            kept.unlink()
            _remove_gradients(kept)
    if group.size > 1 and group.leads_machine:
        check_target(path, overwrite=options.overwrite)
        locate(options.model, revision=options.revision, trust_remote_code=options.trust_remote_code)


def _check_alike(asked: Mapping[str, Any], group: Group) -> None:
    """Raise `ChanfmtError` where processes have different models or texts, as machines with caches of their own may."""
    for rank, other in enumerate(group.exchange(asked)):
        if other != asked:
            names = ", ".join(checkpoint.ASKED[name] for name in asked if other[name] != asked[name])
            raise ChanfmtError(
                f"ranks {group.rank} and {rank} of {group.size} differ in: {names}",
                hint="every machine needs the same model, revision and text",
            )


def assemble(
    plan: BuildPlan, measurement: Measurement, settings: LabelSettings, options: BuildOptions, session: Session
) -> AtlasContent:
    """Label what was measured and put it into the shape of a file."""
    layers: list[Mapping[str, np.ndarray]] = []
    supports: dict[str, tuple[int, np.ndarray]] = {}
    for place, group in itertools.groupby(
        zip(plan.ffns, measurement.statistics, strict=True), lambda item: (item[0].place, block_of(item[0].container))
    ):
        # All FFNs of a block read what the block before wrote, and write for the one after.
        masses = []
        with _weights(plan, place[1]):
            for ffn, statistics in group:
                weights = (ffn_weights(plan.model, member) for member in ffn.members)
                dimensions, support = supports.get(place[0], (0, None))
                # Between two stages of a hierarchy the dimensions become others.
                variables, mass = layer_variables(
                    statistics, weights, settings, support if dimensions == ffn.read_inputs else None
                )
                layers.append(measurement.laid_aside(len(layers), variables))
                masses.append(mass)
        supports[place[0]] = (
            len(masses[-1]),
            labels.top_indices(np.sum([mass for mass in masses if len(mass) == len(masses[-1])], axis=0), settings.support_size),
        )
    return _content(plan, measurement, settings, options, session, layers)


@contextlib.contextmanager
def _weights(plan: BuildPlan, block: str | None) -> Iterator[None]:
    """The model has the weights of ``block`` in this context, where it does not always."""
    number = plan.streamed.chain.number_of(block) if plan.streamed and block else None
    if plan.streamed is None or number is None:
        yield
    else:
        with plan.streamed.chain.loaded(number):
            yield


def assemble_partial(
    plan: BuildPlan,
    measurement: Measurement,
    settings: LabelSettings,
    options: BuildOptions,
    session: Session,
    asked: dict[str, Any],
    environment: dict[str, Any],
) -> AtlasContent:
    """An atlas of the sequences measured so far, with what it takes to go on from there.

    Of a streamed build it is one of all sequences and of the FFNs that are finished, which are the last
    ones; the gradient that the others need is written beside the checkpoint.
    """
    if isinstance(measurement, StreamedMeasurement):
        measurement.save_gradient(_gradient_path(options.checkpoint, measurement.block))
        done = slice(len(plan.ffns) - len(measurement.statistics), None)
        plan = dataclasses.replace(plan, ffns=plan.ffns[done], slices=plan.slices[done])
    state = measurement.state()
    layers = [
        measurement.laid_aside(number, checkpoint.partial_variables(item, settings)) for number, item in enumerate(state.ffns)
    ]
    content = _content(plan, measurement, settings, options, session, layers)
    extensions = checkpoint.extensions(state, content.blocks, content.stacks, asked, environment)
    return dataclasses.replace(content, status="partial", extensions=extensions)


def _content(
    plan: BuildPlan,
    measurement: Measurement,
    settings: LabelSettings,
    options: BuildOptions,
    session: Session,
    layers: list[Mapping[str, np.ndarray]],
) -> AtlasContent:
    stacks, positions = stack_layers(plan.ffns, layers, _activation(plan.source.config), settings.support_size)
    blocks = tuple(
        Block(index, ffn.layer_index, ffn.place, ffn.container, *position, ffn.width, ffn.experts, slices)
        for index, (ffn, position, slices) in enumerate(zip(plan.ffns, positions, plan.slices, strict=True))
    )
    return AtlasContent(
        title=f"importance atlas of {plan.source.id}",
        model=plan.record,
        calibration=_calibration_record(plan, measurement, options),
        labels=settings,
        core_rho=settings.rho,
        blocks=blocks,
        stacks=tuple(stacks),
        producer=_producer_record(plan, session),
    )


def _measure(
    plan: BuildPlan,
    settings: LabelSettings,
    options: BuildOptions,
    start: checkpoint.PassState | None,
    after_batch: Callable[[Measurement], object],
    group: Group,
    spool: Spool,
) -> Measurement:
    if plan.streamed is not None:
        assert isinstance(plan.tokens, CalibrationTokens)
        with progress_bar(steps(plan.streamed, len(plan.tokens)), "seq", "measuring") as bar:
            return measure_streamed(
                plan.streamed,
                plan.tokens,
                spool,
                settings=settings,
                loss=plan.loss,
                batch_size=options.batch,
                progress=bar.update,
                start=start,
                after_batch=after_batch,
                gradient=_gradient_path(options.checkpoint, start.stream.block) if start and start.stream else None,
            )
    with progress_bar(len(plan.tokens) * plan.tokens.seq_len, "tok", "measuring") as bar:
        return measure(
            plan.model,
            plan.ffns,
            plan.tokens,
            rho=settings.rho,
            loss=plan.loss,
            batch_size=options.batch,
            progress=bar.update,
            start=start,
            after_batch=after_batch,
            group=group,
        )


def _gradient_path(kept: Path, block: int) -> Path:
    """Where the gradient lies that a streamed build continues with before ``block``."""
    return kept.with_name(f"{kept.name}.gradient-{block}")


def _note_kept(kept: Path, measurement: Measurement) -> None:
    """The checkpoint ``kept`` holds ``measurement``: gradients that went with an earlier one are not needed any more."""
    if isinstance(measurement, StreamedMeasurement):
        measurement.fresh = False
        _remove_gradients(kept, measurement.block)


def _remove_gradients(kept: Path, needed: int | None = None) -> None:
    """Remove what `_gradient_path` names beside ``kept``, but for that of the block ``needed``."""
    for path in kept.parent.glob(f"{glob.escape(kept.name)}.gradient-*"):
        if needed is None or path != _gradient_path(kept, needed):
            path.unlink(missing_ok=True)


def _resume(
    plan: BuildPlan, options: BuildOptions, asked: dict[str, Any], environment: dict[str, Any]
) -> checkpoint.Checkpoint | None:
    """The checkpoint to continue from, where that was asked for and there is one."""
    kept = options.checkpoint
    if not os.path.lexists(kept):
        if options.resume:
            say(f"note: there is no {kept} to continue; starting from the beginning")
        return None
    if not options.resume:
        if checkpoint.is_checkpoint(kept):
            say(
                f"note: starting over although {kept} holds an unfinished build, which --resume would continue",
            )
        else:
            checkpoint.set_aside(kept, f"{kept} is in the way and is no unfinished build")
        return None
    try:
        found = checkpoint.read_checkpoint(kept)
    except AtlasError as error:
        checkpoint.set_aside(kept, error.message)
        return None
    checkpoint.check_same(found, asked, options.batch, kept)
    if found.modules != tuple((ffn.container, ffn.width) for ffn in plan.ffns)[-len(found.modules) if options.stream else 0 :]:
        checkpoint.set_aside(kept, f"{kept} holds other FFNs than this chanfmt finds in the model")
        return None
    checkpoint.note_environment(found, environment)
    done = (
        f"{len(found.modules)} of {len(plan.ffns)} FFNs"
        if options.stream
        else f"{found.state.sequences} of {asked['sequences']} sequences"
    )
    say(f"continuing after {done}")
    return found


def _session(before: checkpoint.Checkpoint | None) -> Session:
    if before is None:
        return Session(time.monotonic())
    line = {
        "command": recorded_command("atlas"),
        "resumed_at_sequence": before.state.sequences,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return Session(time.monotonic(), before.producer, (*before.producer.history, line))


def _asked(plan: BuildPlan, settings: LabelSettings, options: BuildOptions) -> dict[str, Any]:
    model, counts = plan.record, np.bincount(plan.tokens.source_of, minlength=len(plan.sources))
    names = [source.name for source in plan.sources]
    return {
        "fingerprint": model.fingerprint,
        "config_sha256": model.config_sha256,
        "dtype": model.dtype,
        "stream": "yes" if plan.streamed else "no",
        "metric_definition": schema.METRIC_DEFINITION,
        "loss_definition": plan.loss.definition,
        "source": names[0] if len(names) == 1 else " + ".join(f"{n} of {name}" for n, name in zip(counts, names, strict=True)),
        "revision": " ".join(source.revision for source in plan.sources),
        "seq_len": plan.tokens.seq_len,
        "sequences": len(plan.tokens),
        "seed": options.seed,
        "sequences_sha256": checkpoint.sequences_digest(plan.tokens.sha256),
        **dataclasses.asdict(settings),
    }


def _environment(plan: BuildPlan) -> dict[str, Any]:
    versions = _versions()
    return {name: versions[name] for name in ("chanfmt", "torch", "transformers")} | {
        "threads": torch.get_num_threads(),
        "hardware": _hardware(plan),
    }


def _calibration_record(plan: BuildPlan, measurement: Measurement, options: BuildOptions) -> CalibrationRecord:
    """The sequences measured so far: all of them in the end."""
    tokens, count = plan.tokens, measurement.sequences
    rows, source_of = contributions(plan.sources, tokens, count, plan.record)
    return CalibrationRecord(
        loss=plan.loss.definition,
        metric_definition=schema.METRIC_DEFINITION,
        tokenizer=plan.source.id if isinstance(tokens, CalibrationTokens) else "",
        seq_len=tokens.seq_len,
        seed=options.seed,
        mean_loss=measurement.mean_loss,
        sequence_sha256=tokens.sha256[:count],
        source_of=source_of,
        split_of=tokens.split_of[:count],
        contributions=rows,
        token_ids=tokens.ids[:count] if isinstance(tokens, CalibrationTokens) and not options.no_store_tokens else None,
    )


def _producer_record(plan: BuildPlan, session: Session) -> ProducerRecord:
    seconds = time.monotonic() - session.started
    # Kilobytes on Linux, bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    command = recorded_command("atlas")
    if session.before is not None:
        seconds += session.before.seconds
        peak = max(peak, session.before.peak_memory_bytes)
        command = session.before.command
    return ProducerRecord(_versions(), command, _hardware(plan), seconds, peak, session.history)


def _versions() -> dict[str, str]:
    import h5py
    import transformers

    return {
        "chanfmt": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "h5py": h5py.__version__,
        "numpy": np.__version__,
    }


def _hardware(plan: BuildPlan) -> str:
    devices = {parameter.device for parameter in plan.model.parameters()}
    device = next(plan.model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    count = len(devices) * processes()
    return f"{count} x {name}" if count > 1 else name


def _activation(config: Any) -> str:
    text = config.get_text_config()
    for name in ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act"):
        value = getattr(text, name, None)
        if isinstance(value, str):
            return value
    return "unknown"
