"""Write the cut of a checkpoint as a GGUF file: llama.cpp's names of its tensors, its config and tokenizer as metadata."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.algebra.gguf_names import tensor_name, tensor_names
from chanfmt.base.errors import ModelError
from chanfmt.base.text import one_line
from chanfmt.models.gguf_header import BF16, F16, F32, UINT64, Header, StoredTensor, Value
from chanfmt.models.gguf_rotation import DIVISORS
from chanfmt.models.rotary_fields import head_size
from surgery.cut.gguf.hyperparameters import (
    ARCHITECTURES,
    GEMMA3,
    LLAMA,
    hyperparameters,
    position_divisors,
    scaling_note,
)
from surgery.cut.gguf.layout import PURPOSE, GgufLayout, Part, TensorLayout, placed, target_kind
from surgery.cut.gguf.metadata import described
from surgery.cut.gguf.vocabulary import vocabulary
from surgery.planning.formats import uneven_gguf

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chanfmt.models.source import ModelSource
    from surgery.cut.checkpoint.cuts import Cut, Widths
    from surgery.planning.plan import PruningPlan

WAY_OUT = "leave out --format gguf, and convert the result with llama.cpp: python convert_hf_to_gguf.py DIR --outfile X.gguf"
_KINDS = {"F32": F32, "F16": F16, "BF16": BF16}
"""Dtype of a matrix in a checkpoint to its type in a GGUF file, if no other is asked for."""
_ROTATED = (".attn_q.weight", ".attn_k.weight")
_ALIGNMENT = 32


def check_convertible(source: ModelSource) -> dict[str, Value]:
    """Raise an error if the cut of the checkpoint ``source`` cannot be written as a GGUF file. Returns the metadata before the cut.

    Raises:
        ModelError: The model's type, its config or its tokenizer has no counterpart that is known to be the same.
        MissingPackageError: The package gguf is not installed.
    """
    try:
        if source.trust_remote_code and "auto_map" in source.config_fields:
            raise ModelError("it has code of its own")
        config = source.config
        values = hyperparameters(config)
        _named(source, config.num_hidden_layers)
        return values | vocabulary(source, config.vocab_size)
    except ModelError as error:
        raise ModelError(f"--format gguf cannot write {source.id}: {error.message}", hint=WAY_OUT) from None


def check_one_width(plan: PruningPlan, widths: Widths) -> None:
    """Raise `UsageError` if the cut leaves FFNs with different widths, which transformers cannot read from a GGUF file."""
    if len(set(widths.values())) > 1:
        raise uneven_gguf(uniform=plan.allocation == "uniform")


def lay_out_converted(
    source: ModelSource,
    written: ModelSource,
    cuts: Mapping[str, Cut],
    *,
    quant: str | None = None,
    cut_quant: str | None = None,
) -> tuple[GgufLayout, Header]:
    """Decide how ``written`` becomes a GGUF file. Returns the tensors, and a header that says which there are.

    Args:
        source: The checkpoint before the cut. Its dtypes are those of the file, unless a type is asked for.
        written: The cut in float32.
        cuts: Name of every tensor that is cut to its cut.
        quant, cut_quant: As in `surgery.cut.options.CutOptions`.

    Raises:
        ModelError: llama.cpp has no name for a tensor.
        MissingPackageError: The package gguf is not installed.
    """
    config = written.config
    stored = {}
    for name, new in _named(written, config.num_hidden_layers).items():
        entry, before = written.index.tensors[name], source.index.tensors.get(name)
        kind = F32 if len(entry.shape) < 2 or before is None else _KINDS.get(before.dtype, F32)
        stored[name] = StoredTensor(new, entry.shape, kind)
    header = Header(
        {"general.architecture": Value.of(ARCHITECTURES[config.model_type])}, {item.name: item for item in stored.values()}, 0
    )
    notes: Counter[str] = Counter()
    found = []
    own = ARCHITECTURES[config.model_type]
    for name, tensor in stored.items():
        kind, note = target_kind(header, tensor, tensor.shape[-1], same=name not in cuts, quant=quant, cut_quant=cut_quant)
        if note:
            notes[note] += 1
        order = None
        if own == LLAMA and tensor.name.endswith(_ROTATED):
            order = interleaved(tensor.shape[0], head_size(config))
        # A norm of a Gemma multiplies by one more than its weight, and llama.cpp's by its weight.
        part = Part(name, False, None, None, order, 1.0 if own == GEMMA3 and tensor.name.endswith("norm.weight") else 0.0)
        found.append(TensorLayout(tensor, replace(tensor, kind=kind), (part,), copied=False))
    if (values := position_divisors(config)) is not None:
        tensor = StoredTensor(DIVISORS, values.shape, F32)
        found.append(TensorLayout(tensor, tensor, (), copied=False, values=values))
    return placed(found, _ALIGNMENT, notes, scaling_note(config)), header


def converted_values(written: ModelSource, layout: GgufLayout, name: str, base: str) -> dict[str, Value]:
    """The metadata of the result.

    Args:
        written: The cut.
        name: Name of the result.
        base: Name of the model that was cut.
    """
    tensors = [item.target for item in layout.tensors]
    values = hyperparameters(written.config) | described(tensors)
    values["general.name"] = Value.of(name)
    values |= {"general.base_model.count": Value.of(1), "general.base_model.0.name": Value.of(base)}
    values["general.parameter_count"] = Value.of(written.index.parameters, UINT64)
    return values | vocabulary(written, written.config.vocab_size)


def interleaved(rows: int, head: int) -> np.ndarray:
    """Old row of each row of a query or key projection: llama.cpp rotates neighbours, and transformers the halves of a head."""
    return np.arange(rows).reshape(-1, 2, head // 2).swapaxes(1, 2).ravel()


def _named(source: ModelSource, layers: int) -> dict[str, str]:
    """Name of every tensor of ``source`` to its name in llama.cpp, without the output head if it is tied to the embeddings."""
    names = tensor_names(ARCHITECTURES[source.config.model_type], layers, PURPOSE)
    tied = bool(source.config.tie_word_embeddings)
    found: dict[str, str] = {}
    for name, entry in source.index.tensors.items():
        new = tensor_name(names, name)
        if new is None or new in found.values() or entry.dtype not in _KINDS:
            raise ModelError(f"llama.cpp has no place for its tensor {one_line(name)} ({one_line(entry.dtype)})")
        if not (tied and new == "output.weight"):
            found[name] = new
    if not tied and "output.weight" not in found.values():
        raise ModelError("its output head is missing")
    return found
