"""`atlas build`, in memory: resolve, load, find, measure, label, write."""

from __future__ import annotations

import hashlib
import platform
import resource
import shlex
import sys
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from chanfmt import __version__, labels, schema
from chanfmt.console import progress_bar, say
from chanfmt.files import check_target
from chanfmt.models.checkpoint import CheckpointIndex, fingerprint
from chanfmt.models.discover import FFN, find_ffns
from chanfmt.models.load import load_config, load_model, load_tokenizer
from chanfmt.models.resolve import ResolvedModel, resolve_model
from chanfmt.models.tensors import tensor_slices
from chanfmt.models.weights import ffn_weights
from chanfmt.produce.derive import layer_variables, stack_layers
from chanfmt.produce.measure import Measurement, measure
from chanfmt.produce.text import Text, read_text
from chanfmt.produce.tokens import CalibrationTokens, check_fits, sample, tokenize
from chanfmt.records import (
    AtlasContent,
    Block,
    CalibrationRecord,
    Contribution,
    LabelSettings,
    ModelRecord,
    ProducerRecord,
    TensorSlice,
)
from chanfmt.writer import write_atlas

if TYPE_CHECKING:
    from pathlib import Path

    from chanfmt.produce.options import BuildOptions

PLACE = "decoder"


@dataclass(frozen=True)
class BuildPlan:
    """Everything that is decided before the pass: the model, its FFNs, the tokens."""

    resolved: ResolvedModel
    config: Any
    model: Any
    ffns: list[FFN]
    slices: list[tuple[TensorSlice, ...]]
    fingerprint: str
    text: Text
    tokens: CalibrationTokens
    blocks_available: int

    def summary(self) -> dict[str, Any]:
        """What would be measured, for ``--dry-run``."""
        return {
            "model": self.resolved.id,
            "revision": self.resolved.revision,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "ffns": len(self.ffns),
            "channels": sum(ffn.width for ffn in self.ffns),
            "widths": sorted({ffn.width for ffn in self.ffns}),
            "gated": self.ffns[0].gated,
            "write": self.ffns[0].write,
            "reads": list(dict.fromkeys(read.module for read in self.ffns[0].reads)),
            "calibration": self.text.source,
            "sequences": len(self.tokens.ids),
            "tokens": int(self.tokens.ids.size),
        }


def plan_build(options: BuildOptions, settings: LabelSettings) -> BuildPlan:
    """Check the request, load the model and the text, find the FFNs. Nothing is measured or written.

    Raises:
        UsageError, ModelError: What is wrong with the request or the model.
    """
    options.check()
    settings.check()
    if not options.dry_run:
        check_target(options.path, overwrite=options.overwrite)
    resolved = resolve_model(options.model, revision=options.revision)
    config = load_config(resolved, trust_remote_code=options.trust_remote_code)
    index = CheckpointIndex.open(resolved.directory)
    tokenizer = load_tokenizer(resolved, trust_remote_code=options.trust_remote_code)
    text = read_text(options.calib, "calibrate", quiet=options.quiet)
    token_ids = tokenize(tokenizer, text)
    check_fits(config, token_ids, options.seq_len, resolved.id)
    tokens = sample(token_ids, options.sequences, options.seq_len, options.seed, options.calib)
    if len(tokens.ids) < options.sequences:
        say(f"note: {text.source} has {len(tokens.ids)} different sequences of {options.seq_len} tokens, "
            f"not {options.sequences}; using them all", quiet=options.quiet)
    model = load_model(
        resolved, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code
    )
    ffns = find_ffns(model, config.get_text_config().vocab_size)
    slices = [tensor_slices(model, ffn, index) for ffn in ffns]
    return BuildPlan(resolved, config, model, ffns, slices, fingerprint(index), text, tokens,
                     len(token_ids) // options.seq_len)


def build(options: BuildOptions, settings: LabelSettings) -> Path:
    """Measure ``options.model`` and write its atlas. Returns the path written.

    Raises:
        ChanfmtError: Anything that a user can mend; nothing is left behind then.
    """
    plan = plan_build(options, settings)
    say(f"{plan.resolved.id}: {len(plan.ffns)} FFNs, {plan.summary()['channels']:,} channels; "
        f"{len(plan.tokens.ids)} x {plan.tokens.ids.shape[1]} tokens of {plan.text.source}", quiet=options.quiet)
    started = time.monotonic()
    measurement = _measure(plan, settings, options)
    content = assemble(plan, measurement, settings, options, time.monotonic() - started)
    write_atlas(content, options.path)
    return options.path


def assemble(
    plan: BuildPlan, measurement: Measurement, settings: LabelSettings, options: BuildOptions, seconds: float
) -> AtlasContent:
    """Label what was measured and put it into the shape of a file."""
    layers, support, dimensions = [], None, 0
    for ffn, statistics in zip(plan.ffns, measurement.statistics, strict=True):
        weights = ffn_weights(plan.model, ffn)
        variables, support = layer_variables(statistics, weights, settings, support)
        layers.append(variables)
        dimensions = len(weights.write)
    supports = labels.support_sizes(dimensions, settings.support_size)
    stacks, positions = stack_layers(plan.ffns, layers, _activation(plan.config), PLACE, supports)
    blocks = tuple(
        Block(index, ffn.layer_index, PLACE, ffn.container, *position, ffn.width, 0, slices)
        for index, (ffn, position, slices) in enumerate(zip(plan.ffns, positions, plan.slices, strict=True))
    )
    return AtlasContent(
        title=f"importance atlas of {plan.resolved.id}",
        model=_model_record(plan),
        calibration=_calibration_record(plan, measurement, options),
        labels=settings,
        core_rho=settings.rho,
        blocks=blocks,
        stacks=tuple(stacks),
        producer=_producer_record(plan, seconds),
    )


def _measure(plan: BuildPlan, settings: LabelSettings, options: BuildOptions) -> Measurement:
    with progress_bar(int(plan.tokens.ids.size), "tok", "measuring", quiet=options.quiet) as bar:
        return measure(plan.model, plan.ffns, plan.tokens, rho=settings.rho, batch_size=options.batch,
                       progress=bar.update)


def _model_record(plan: BuildPlan) -> ModelRecord:
    config = (plan.resolved.directory / "config.json").read_text(encoding="utf-8")
    return ModelRecord(
        id=plan.resolved.id,
        revision=plan.resolved.revision,
        source=plan.resolved.source,
        model_type=plan.config.model_type,
        architectures=tuple(plan.config.architectures or (type(plan.model).__name__,)),
        config=config,
        config_sha256=hashlib.sha256(config.encode()).hexdigest(),
        dtype=str(next(plan.model.parameters()).dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in plan.model.parameters()),
        fingerprint=plan.fingerprint,
    )


def _calibration_record(plan: BuildPlan, measurement: Measurement, options: BuildOptions) -> CalibrationRecord:
    tokens = plan.tokens
    contribution = Contribution(
        id=uuid.uuid4().hex,
        source=plan.text.source,
        revision=plan.text.revision,
        range=f"0:{plan.blocks_available}",
        sequences=len(tokens.ids),
        tokens=int(tokens.ids.size),
        producer=f"chanfmt {__version__}",
    )
    return CalibrationRecord(
        loss=schema.LOSS,
        metric_definition=schema.METRIC_DEFINITION,
        tokenizer=plan.resolved.id,
        seq_len=options.seq_len,
        seed=options.seed,
        mean_loss=measurement.mean_loss,
        sequence_sha256=tokens.sha256,
        source_of=np.zeros(len(tokens.ids), dtype=np.int32),
        split_of=tokens.split_of,
        contributions=(contribution,),
        token_ids=None if options.no_store_tokens else tokens.ids,
    )


def _producer_record(plan: BuildPlan, seconds: float) -> ProducerRecord:
    import h5py
    import transformers

    device = next(plan.model.parameters()).device
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return ProducerRecord(
        versions={
            "chanfmt": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "h5py": h5py.__version__, "numpy": np.__version__,
        },
        command=shlex.join(["atlas", *sys.argv[1:]]).encode("utf-8", "replace").decode("utf-8"),
        hardware=hardware,
        seconds=seconds,
        # Kilobytes on Linux, bytes on macOS.
        peak_memory_bytes=peak * (1 if sys.platform == "darwin" else 1024),
    )


def _activation(config: Any) -> str:
    text = config.get_text_config()
    for name in ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act"):
        value = getattr(text, name, None)
        if isinstance(value, str):
            return value
    return "unknown"
