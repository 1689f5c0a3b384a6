"""An atlas of activation power from llama.cpp's importance matrix and the model that the matrix was measured on.

The matrix gives the mean squared activation of every channel, and of the inputs of other weights that it covers. The checkpoint
gives the norms of the weights. Everything that needs a gradient is absent. Supernodes are ranked by activation power, and the labels say so.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra import labels, metrics
from chanfmt.algebra.gguf_names import down_projection, tensor_names, weight_name
from chanfmt.algebra.inputs import Input, inputs_group, joined
from chanfmt.algebra.rewrite import dropped_names
from chanfmt.base.errors import ModelError, UsageError
from chanfmt.base.narrate import say, warn
from chanfmt.base.text import one_line
from chanfmt.base.version import __version__
from chanfmt.building.assemble import activation_name
from chanfmt.building.derive import by_expert, stack_layers
from chanfmt.building.inputs import read_weights
from chanfmt.building.plan import model_record
from chanfmt.building.session import Session, producer_record
from chanfmt.building.weight_metrics import norms
from chanfmt.building.widths import find_widths
from chanfmt.format import schema
from chanfmt.format.records import AtlasContent, Block, CalibrationRecord, Contribution, LabelSettings
from chanfmt.models.find.discover import find_ffns
from chanfmt.models.imatrix_file import PURPOSE, read_imatrix
from chanfmt.models.load import load_model
from chanfmt.models.matrices import ffn_weights
from chanfmt.models.stored.layout import stored_names, tensor_slices

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chanfmt.format.records import ModelRecord, TensorSlice
    from chanfmt.models.ffn import FFN
    from chanfmt.models.imatrix_file import Imatrix, ImatrixEntry
    from chanfmt.models.source import ModelSource

SCORE = "activation_power"
"""The metric that ranks supernodes: the only one that comes from text."""
_UNSEEN = "the matrix does not name its text"


def imported(path: Path, source: ModelSource, settings: LabelSettings | None = None, *, chunk_size: int = 512) -> AtlasContent:
    """The content of an atlas, from the importance matrix in ``path`` and its model.

    Args:
        source: The model that the matrix was measured on.
        settings: How channels are labelled; the score is `SCORE` in any case.
        chunk_size: Tokens of a chunk, for the older layout, which does not say it.

    Raises:
        UsageError: The file is not an importance matrix, or lacks a down projection of the model, or its shape differs.
        ModelError: The model cannot be loaded, or llama.cpp does not know it.
        MissingPackageError: The package gguf is not installed.
    """
    session = Session(time.monotonic())
    settings = replace(settings or LabelSettings(), score=SCORE)
    settings.check()
    matrix = read_imatrix(path, chunk_size)
    _ = source.config, source.index
    model = load_model(source, device="cpu")
    ffns = find_ffns(model)
    slices = [tensor_slices(model, ffn, source.index) for ffn in ffns]
    widths, _, _ = find_widths(source, ffns, slices)
    names = _names(source, ffns)
    entries = _entries(path, matrix, source, ffns, slices, names)
    sequences, seq_len = _sequences(path, matrix, ffns, entries)
    if not matrix.counted:
        say(
            f"{path.name} has the older layout, which does not count tokens: {seq_len} tokens a chunk are assumed, and every expert "
            "counts all tokens"
        )
    layers = [
        _layer(ffn, entry, [ffn_weights(model, member) for member in ffn.members], settings)
        for ffn, entry in zip(ffns, entries, strict=True)
    ]
    stacks, positions = stack_layers(ffns, layers, activation_name(source.config), settings.support_size)
    stacks = [replace(stack, splits=1) for stack in stacks]
    blocks = tuple(
        Block(
            index, ffn.layer_index, ffn.place, ffn.container, *position, ffn.width, ffn.experts, items, width.field, width.factor,
            width.channel_parameters,
        )
        for index, (ffn, position, items, width) in enumerate(zip(ffns, positions, slices, widths, strict=True))
    )  # fmt: skip
    record = model_record(source, model)
    stored = stored_names(model, source.index, [item.parameter for ffn in ffns for item in ffn.other_maps])
    inputs = [row for ffn, items in zip(ffns, slices, strict=True) for row in _inputs(matrix, names, ffn, items, stored)]
    _narrate(path, matrix, names, inputs, ffns, slices)
    return AtlasContent(
        title=f"activation power of {source.id}, from an importance matrix",
        model=record,
        calibration=_calibration(path, matrix, record, sequences, seq_len),
        labels=settings,
        core_rho=settings.rho,
        blocks=blocks,
        stacks=tuple(stacks),
        producer=producer_record(session, model),
        dropped=dropped_names((item.name for item in schema.STACK_VARIABLES), stacks),
        extensions=(inputs_group(inputs),) if inputs else (),
    )


def _names(source: ModelSource, ffns: Sequence[FFN]) -> Any:
    """llama.cpp's names of the model's tensors. Raises `ModelError` if llama.cpp does not know the model."""
    kind = str(source.config.get_text_config().model_type)
    names = tensor_names(kind, 1 + max(ffn.layer_index for ffn in ffns), PURPOSE)
    if names is None:
        raise ModelError(
            f"llama.cpp does not know the model type {one_line(kind)}, so no importance matrix can be of {source.id}"
        )
    return names


def _entries(
    path: Path,
    matrix: Imatrix,
    source: ModelSource,
    ffns: Sequence[FFN],
    slices: Sequence[tuple[TensorSlice, ...]],
    names: Any,
) -> list[ImatrixEntry]:
    """The entry of each of ``ffns``."""
    found: list[ImatrixEntry] = []
    missing: list[str] = []
    for ffn, items in zip(ffns, slices, strict=True):
        name = down_projection(names, (item.tensor for item in items if item.role == "write"))
        if name is None:
            raise ModelError(f"llama.cpp has no name for the down projection of {ffn.container}")
        entry = matrix.entries.get(name)
        if entry is None:
            missing.append(name)
            continue
        count = max(1, ffn.experts)
        if not matrix.counted:
            entry = entry.by_expert(count, ffn.width)
        sums = entry.sums
        if sums.shape != (count, ffn.width):
            raise UsageError(
                f"{path}: {name} has {sums.shape[0]} x {sums.shape[1]} values, and {source.id} has {count} x {ffn.width} channels there",
                hint="name the model that the matrix was measured on",
            )
        found.append(entry)
    if missing:
        raise UsageError(
            f"{path} has nothing for {one_line(missing[0])}"
            + (f" and {len(missing) - 1} more down projections" if len(missing) > 1 else "")
            + f" of {source.id}",
            hint="name the model that the matrix was measured on, or compute a matrix of all its layers",
        )
    return found


def _inputs(
    matrix: Imatrix, names: Any, ffn: FFN, slices: Sequence[TensorSlice], stored: Mapping[str, Sequence[str]]
) -> list[Input]:
    """What the read projections of ``ffn`` and the other maps of its block read, as far as ``matrix`` has entries for them."""

    def rows(weight: str, experts: int, width: int) -> Sequence[tuple[np.ndarray, int]]:
        entry = matrix.entries.get(weight_name(names, weight) or "")
        if entry is None:
            return ()
        if not matrix.counted:
            entry = entry.by_expert(experts, width)
        if entry.sums.shape != (experts, width) or (entry.counts != entry.counts.round()).any():
            return ()
        counts = [int(count) for count in entry.counts]
        return [(sums if count else np.zeros_like(sums), count) for sums, count in zip(entry.sums, counts, strict=True)]

    others = [
        Input((weight,), None, count, sums)
        for item in ffn.other_maps
        for weight in stored.get(item.parameter, ())
        for sums, count in rows(weight, 1, item.inputs)
    ]
    reads: list[Input] = []
    for expert, weights in enumerate(read_weights(ffn, slices)):
        found = [(weight, rows(weight, len(ffn.members), ffn.read_inputs)) for weight in weights]
        number = expert if ffn.experts else None
        reads += joined([Input((weight,), number, *row[expert][::-1]) for weight, row in found if row])
    return [*joined(others), *reads]


def _narrate(
    path: Path, matrix: Imatrix, names: Any, inputs: Sequence[Input], ffns: Sequence[FFN], slices: Sequence[Sequence[TensorSlice]]
) -> None:
    """Say which entries of ``matrix`` the atlas does not keep."""
    kept = {weight_name(names, weight) for row in inputs for weight in row.weights}
    kept |= {weight_name(names, item.tensor) for items in slices for item in items if item.role == "write"}
    if lost := sorted(matrix.entries.keys() - kept):
        more = f" and {len(lost) - 1:,} more entries" if len(lost) > 1 else ""
        say(f"note: {path.name} has {one_line(lost[0])}{more}, which no linear map of the model's blocks reads alike; left out")
    if not inputs:
        say(f"note: {path.name} covers the down projections of {len(ffns):,} FFNs, and neither attention nor read projections")


def _sequences(path: Path, matrix: Imatrix, ffns: Sequence[FFN], entries: Sequence[ImatrixEntry]) -> tuple[int, int]:
    """Number and length of the sequences, such that a dense FFN sees all their tokens.

    Raises:
        UsageError: Dense FFNs saw different numbers of tokens, a count is not a whole number, or no token was seen.
    """
    dense = {float(entry.counts[0]) for ffn, entry in zip(ffns, entries, strict=True) if not ffn.experts}
    if len(dense) > 1:
        raise UsageError(
            f"{path}: the layers saw different numbers of tokens, {min(dense):g} and {max(dense):g}",
            hint="compute the matrix again",
        )
    whole = [float(value) for entry in entries for value in entry.counts]
    if any(value != round(value) for value in whole):
        raise UsageError(f"{path}: a count of tokens is not a whole number", hint="compute the matrix again")
    named = matrix.chunks * matrix.chunk_size
    total = int(dense.pop()) if dense else max(named, int(max(whole)))
    if total < 1:
        raise UsageError(f"{path}: no token was measured", hint="compute the matrix again")
    if matrix.chunk_size and total % matrix.chunk_size == 0:
        return total // matrix.chunk_size, matrix.chunk_size
    if named and named != total:
        warn(f"{path.name} names {named:,} tokens and counts {total:,}; the counts are used")
    return 1, total


def _layer(ffn: FFN, entry: ImatrixEntry, weights: Sequence[Any], settings: LabelSettings) -> dict[str, np.ndarray]:
    """Every array of one FFN, without the layer dimension."""
    rows = [
        _member(sums, int(count), each, settings) for sums, count, each in zip(entry.sums, entry.counts, weights, strict=True)
    ]
    return by_expert(rows) if ffn.experts else rows[0]


def _member(sums: np.ndarray, tokens: int, weights: Any, settings: LabelSettings) -> dict[str, np.ndarray]:
    count = np.int64(tokens)
    variables: dict[str, np.ndarray] = {
        "tokens": np.asarray(count),
        "tokens_split": np.array([tokens], dtype=np.int64),
        # Where no token arrived, files hold what their program writes for unknown.
        "sum_u2": sums if tokens else np.zeros_like(sums),
        **norms(weights),
    }
    variables |= metrics.derive_metrics(variables, count)
    variables["label"], variables["protection"] = labels.label_ffn(variables[SCORE], None, None, settings)
    return variables


def _calibration(path: Path, matrix: Imatrix, model: ModelRecord, sequences: int, seq_len: int) -> CalibrationRecord:
    """The record of a text of which only the length is known."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # The token ids are unknown. These digests tell the sequences from those of all other atlases, and from each other.
    hashes = tuple(hashlib.sha256(f"imatrix {digest} {number}".encode()).hexdigest() for number in range(sequences))
    identity = "\n".join([model.fingerprint, model.config_sha256, model.dtype, *hashes])
    row = Contribution(
        id=hashlib.sha256(identity.encode()).hexdigest()[:32],
        source=", ".join(matrix.datasets) or _UNSEEN,
        revision=digest,
        range=f"0:{sequences}",
        sequences=sequences,
        tokens=sequences * seq_len,
        producer=f"importance matrix {one_line(path.name)}, imported by chanfmt {__version__}",
    )
    return CalibrationRecord(
        # Nothing was differentiated, and no metric of the file rests on the loss. Version 1.0 has no word for that.
        loss=schema.LOSSES["next-token"],
        metric_definition=schema.METRIC_DEFINITION,
        tokenizer="",
        seq_len=seq_len,
        seed=0,
        mean_loss=0.0,
        sequence_sha256=hashes,
        source_of=np.zeros(sequences, dtype=np.int32),
        split_of=np.zeros(sequences, dtype=np.uint8),
        contributions=(row,),
    )
