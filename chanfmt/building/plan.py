"""The plan of a build: everything that is decided before the pass. Nothing is measured or written here."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from chanfmt.base.files import check_target
from chanfmt.base.narrate import progress_bar, say
from chanfmt.building.columns import ColumnPlan, plan_columns
from chanfmt.building.loss import Loss, choose_loss
from chanfmt.building.options import AUTO, RECOMPUTE, STREAM, WHOLE
from chanfmt.building.plan_arrays import plan_arrays
from chanfmt.building.refusals import prune_refusals
from chanfmt.building.requirements import check_requirements
from chanfmt.building.widths import FFNWidth, find_widths
from chanfmt.data.arrays import CalibrationInputs, InputFile, draw_tokens, read_inputs
from chanfmt.data.sampled import sample_sequences
from chanfmt.data.source import Source
from chanfmt.data.sources import draw_text, together
from chanfmt.data.special_tokens import added_by, around_sequences, found_around
from chanfmt.data.text import SELF
from chanfmt.data.tokens import CalibrationTokens, canonical, check_context
from chanfmt.format.columns import ALL_GROUPS
from chanfmt.format.records import LabelSettings, ModelRecord, SpecialTokens, TensorSlice
from chanfmt.models.distributed import processes
from chanfmt.models.find.discover import find_ffns
from chanfmt.models.load import load_model, pick_device, pick_dtype
from chanfmt.models.room import room_for
from chanfmt.models.run import test_tokens
from chanfmt.models.stored.layout import tensor_slices
from chanfmt.models.streaming.blocks import UnstreamableError
from chanfmt.models.streaming.streamed import StreamedModel, open_resident, open_streamed

if TYPE_CHECKING:
    from chanfmt.building.options import BuildOptions
    from chanfmt.models.ffn import FFN
    from chanfmt.models.source import ModelSource


class Locate(Protocol):
    """A function that finds a model by the name that a user writes, such as `chanfmt.hub.locate.locate_model`."""

    def __call__(self, model: str, *, revision: str | None, trust_remote_code: bool) -> ModelSource: ...


@dataclass(frozen=True)
class BuildPlan:
    """What a build will measure, and on what.

    Attributes:
        options, settings: The request that the plan was made for.
        source: The model's files.
        model: The loaded model, frozen and in evaluation mode; for a streamed build, the model without its blocks' weights.
        ffns: The FFNs of the model, in model order.
        slices: For each FFN, where its weights lie in the checkpoint.
        widths: For each FFN, the config field that sets its width.
        loss: The loss that is differentiated.
        sources: The calibration sources, in an order that does not depend on the request's.
        tokens: The sequences or samples that the model is measured on, in canonical order.
        special: The tokens that every sequence begins and ends with; None if the model does not read token sequences.
        added: The tokens that the tokenizer puts around a text; None if the model does not read token sequences.
        unsampled: Sequences that a dry run does not sample from the model.
        streamed: The model as a chain of blocks, for a build that runs block by block; None if the whole graph is in memory.
        width_refusal: Why ``surgery prune`` will refuse the model, if the reason is the widths; otherwise empty.
        width_note: A sentence about FFNs that it will not narrow; empty if there are none, or if it refuses the model.
        columns: The columns that are measured besides; None if there are none.
    """

    options: BuildOptions
    settings: LabelSettings
    source: ModelSource
    model: Any
    ffns: list[FFN]
    slices: list[tuple[TensorSlice, ...]]
    widths: list[FFNWidth]
    loss: Loss
    sources: tuple[Source, ...]
    tokens: CalibrationTokens | CalibrationInputs
    special: SpecialTokens | None = None
    added: SpecialTokens | None = None
    unsampled: int = 0
    streamed: StreamedModel | None = None
    width_refusal: str = ""
    width_note: str = ""
    columns: ColumnPlan | None = None

    @functools.cached_property
    def record(self) -> ModelRecord:
        """The model as the atlas records it. Every partial atlas records it too, so it is made once."""
        return model_record(self.source, self.model)

    @property
    def order(self) -> str:
        """The order of the pass, so far as it is chosen: one of `chanfmt.building.options.ORDERS` besides ``auto``."""
        if self.streamed is None:
            return WHOLE
        return RECOMPUTE if self.streamed.chain.resident else STREAM

    @property
    def channels(self) -> int:
        """Number of channels of all FFNs; the channels of every expert count."""
        return sum(ffn.width * len(ffn.members) for ffn in self.ffns)

    @functools.cached_property
    def refusals(self) -> tuple[str, ...]:
        """Why `surgery prune` will refuse the model, although it can be measured; see `prune_refusals`."""
        reasons = (*prune_refusals(self.source, self.ffns), *([self.width_refusal] if self.width_refusal else []))
        return tuple(dict.fromkeys(reasons))

    def summary(self) -> dict[str, Any]:
        """The plan as ``--dry-run`` prints it, by the names of its lines."""
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
            "columns": list(self.columns.wanted.groups) if self.columns is not None else [],
            "prune": f"refused: {'; '.join(self.refusals)}" if self.refusals else self.width_note or "every FFN can be narrowed",
            **(
                {"begin_with": list(self.special.before), "end_with": list(self.special.after)}
                if self.special is not None
                else {}
            ),
        }


def recomputing(plan: BuildPlan) -> BuildPlan:
    """``plan``, with the blocks of its loaded model run one after the other. Raises `ModelError` if they cannot be."""
    return dataclasses.replace(plan, streamed=open_resident(plan.model))


def may_stream(options: BuildOptions, source: ModelSource) -> bool:
    """Whether a build may read its weights block by block, as far as that can be said without the model."""
    text = options.inputs is None or read_inputs(options.inputs).holds_tokens
    return source.loaded is None and SELF not in options.shares and not options.device_map and text and processes() == 1


def model_record(source: ModelSource, model: Any) -> ModelRecord:
    """What an atlas records of ``model``, which was loaded from ``source``."""
    config = source.config_text
    return ModelRecord(
        id=source.id,
        revision=source.revision,
        source=source.source,
        model_type=source.config.model_type,
        architectures=tuple(source.config.architectures or (type(model).__name__,)),
        config=config,
        config_sha256=hashlib.sha256(config.encode()).hexdigest(),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        fingerprint=source.fingerprint,
    )


def plan_build(options: BuildOptions, settings: LabelSettings, locate: Locate) -> BuildPlan:
    """Check the request, load the model, draw the calibration sequences and find the FFNs.

    Args:
        locate: Finds the model that ``options.model`` names.

    Raises:
        UsageError: The request cannot be carried out.
        ModelError: The model cannot be loaded or measured.
    """
    settings.check()
    file = check_requirements(options)
    if not options.dry_run:
        check_target(options.path, overwrite=options.overwrite)
    source = locate(options.model, revision=options.revision, trust_remote_code=options.trust_remote_code)
    if source.loaded is not None:
        options.check_in_memory()
    # A model that cannot be measured is refused before anything else is read.
    _ = source.config, source.index
    if file is not None and not file.holds_tokens:
        return _plan_of_arrays(options, settings, source, file)
    return _plan_of_tokens(options, settings, source, file)


def _plan_of_tokens(options: BuildOptions, settings: LabelSettings, source: ModelSource, file: InputFile | None) -> BuildPlan:
    """The plan of a build on token sequences: those in ``file`` if there is one, else those that the text sources give."""
    # Read before the model is loaded: a model without a tokenizer cannot be measured on text.
    tokenizer = source.tokenizer
    added = added_by(tokenizer, source.id)
    special = around_sequences(tokenizer, added, options.bos, source.id)
    drawn = _drawn(options, source, file, special)
    if file is not None:
        special = found_around(drawn[0].ids, added)
    streamed = None
    if options.order == STREAM:
        streamed = open_streamed(source, dtype=options.dtype, device=options.device)
    elif options.order == AUTO:
        streamed = _streamed_for_room(options, source)
    if streamed is not None:
        model, ffns = streamed.chain.model, streamed.ffns
    else:
        model = _loaded(options, source)
        ffns = find_ffns(model)
    loss = choose_loss(
        model, tokenizer, test_tokens(model), options.loss, causal=streamed.causal if streamed else None, special=special
    )
    slices = [tensor_slices(model, ffn, source.index) for ffn in ffns]
    sampled = options.shares.get(SELF, 0)
    if sampled:
        drawn.append(_sampled(model, tokenizer, 0 if options.dry_run else sampled, options, special, source.id))
    sources, tokens = together(drawn)
    unsampled = sampled if options.dry_run else 0
    widths, refusal, note = find_widths(source, ffns, slices)
    return BuildPlan(
        options,
        settings,
        source,
        model,
        ffns,
        slices,
        widths,
        loss,
        sources,
        tokens,
        special,
        added,
        unsampled,
        streamed,
        refusal,
        note,
        _columns(options, tokens, ffns, loss, tokenizer),
    )


def _plan_of_arrays(options: BuildOptions, settings: LabelSettings, source: ModelSource, file: InputFile) -> BuildPlan:
    """The plan of a build on the arrays in ``file``, which are not token sequences."""
    model = _loaded(options, source)
    arrays = plan_arrays(model, file, options.loss, options.sequences, options.seed)
    slices = [tensor_slices(model, ffn, source.index) for ffn in arrays.ffns]
    widths, refusal, note = find_widths(source, arrays.ffns, slices)
    return BuildPlan(
        options,
        settings,
        source,
        model,
        arrays.ffns,
        slices,
        widths,
        arrays.loss,
        (arrays.source,),
        arrays.inputs,
        width_refusal=refusal,
        width_note=note,
        columns=_columns(options, arrays.inputs, arrays.ffns, arrays.loss, None),
    )


def _columns(
    options: BuildOptions, tokens: CalibrationTokens | CalibrationInputs, ffns: list[FFN], loss: Loss, tokenizer: Any
) -> ColumnPlan | None:
    everything = ALL_GROUPS in options.columns
    return plan_columns(
        options.column_groups,
        tokens,
        ffns,
        loss,
        tokenizer,
        everything=everything,
        drivers=options.drivers,
        stored=not options.no_store_tokens,
    )


def _drawn(options: BuildOptions, source: ModelSource, file: InputFile | None, special: SpecialTokens) -> list[Source]:
    """The sources that can be drawn from before the model is loaded: all but `SELF`."""
    if file is not None:
        return [draw_tokens(file, options.sequences, options.seq_len, options.seed, model=source)]
    check_context(source.config, options.seq_len, source.id)
    return [
        draw_text(text, sequences, options.seq_len, options.seed, model=source, special=special)
        for text, sequences in options.shares.items()
        if text != SELF
    ]


def _streamed_for_room(options: BuildOptions, source: ModelSource) -> StreamedModel | None:
    """The model, block by block, if its weights do not fit on the device together; None if they fit, or cannot be streamed."""
    if not may_stream(options, source):
        return None
    place = pick_device(options.device)
    room = room_for(source, pick_dtype(options.dtype, place), place)
    if room.fits:
        return None
    try:
        streamed = open_streamed(source, dtype=options.dtype, device=options.device)
    except UnstreamableError as error:
        say(f"note: {error.message}")
        return None
    say(f"note: {room.text}: one block's weights are read at a time, as with --stream")
    return streamed


def _loaded(options: BuildOptions, source: ModelSource) -> Any:
    return load_model(source, dtype=options.dtype, device=options.device, device_map=options.device_map)


def _sampled(model: Any, tokenizer: Any, sequences: int, options: BuildOptions, special: SpecialTokens, name: str) -> Source:
    """The source `SELF`: sequences sampled from the model."""
    total = sequences * (options.seq_len - max(1, len(special.before)) - len(special.after))
    with progress_bar(total, "tok", "sampling") as bar:
        ids = sample_sequences(
            model,
            tokenizer,
            sequences,
            options.seq_len,
            options.seed,
            name=name,
            special=special,
            bos=options.bos != "never",
            batch_size=options.batch,
            progress=bar.update,
        )
    ids = canonical(ids).ids
    return Source(SELF, hashlib.sha256(ids.tobytes()).hexdigest(), len(ids), ids)
