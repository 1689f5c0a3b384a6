"""Check a GGUF file that was just written: what another reader finds in it, and what transformers computes with it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra.gguf_names import gguf_package
from chanfmt.base.errors import CheckError, ModelError
from surgery.cut.check import LOGIT_TOLERANCE, check_memory
from surgery.cut.gguf.layout import PURPOSE, matrix_shape, taken

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from chanfmt.models.gguf_header import Value
    from chanfmt.models.source import ModelSource
    from surgery.cut.gguf.layout import GgufLayout, TensorLayout
    from surgery.planning.plan import PruningPlan

_LARGEST_ERROR = 0.3
"""Largest relative error of a tensor that was quantised, root mean square: 4 bits give about 0.1."""
_LOADED = 2
"""transformers holds the dequantised tensors and the model at once."""


def check_stored(source: Path | None, target: Path, layout: GgufLayout, values: Mapping[str, Value]) -> None:
    """Read ``target`` back with the package gguf, and compare it with its layout, its metadata and ``source``, if there is one.

    Raises:
        CheckError: A value, a shape, a type or a copied row is not as planned.
    """
    gguf = gguf_package(PURPOSE)
    new = gguf.GGUFReader(target)
    for name, value in values.items():
        field = new.fields.get(name)
        if field is None or (len(value.raw) < 1 << 12 and not _same(field.contents(), value.content)):
            raise CheckError(f"the value {name} of the GGUF file is not as planned; nothing was written")
    found = {tensor.name: tensor for tensor in new.tensors}
    before = {} if source is None else {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    if found.keys() != {item.target.name for item in layout.tensors}:
        raise CheckError("the GGUF file has other tensors than planned; nothing was written")
    for item in layout.tensors:
        tensor = found[item.target.name]
        shape = tuple(int(length) for length in tensor.shape)[::-1]
        if (shape, int(tensor.tensor_type)) != (item.target.shape, item.target.kind):
            raise CheckError(f"{item.target.name} of the GGUF file has another shape or type than planned; nothing was written")
        if item.copied and not _copied(item, before[item.source.name].data, tensor.data):
            raise CheckError(f"{item.target.name} of the GGUF file differs from the source's rows; nothing was written")


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) or (isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other))


def _copied(item: TensorLayout, old: np.ndarray, new: np.ndarray) -> bool:
    """Whether ``new`` holds the bytes of the rows of ``old`` that stay."""
    matrices, rows, _ = matrix_shape(item.source)
    before = old.reshape(matrices, rows, -1).view(np.uint8)
    after = new.reshape(matrices, matrix_shape(item.target)[1], -1).view(np.uint8)
    for number in range(matrices):
        part = item.parts[number] if item.parts else None
        kept = before[number] if part is None or part.positions is None else taken(before[number], part.positions)
        if not np.array_equal(kept, after[number]):
            return False
    return True


def check_computed(
    target: Path, layout: GgufLayout, plan: PruningPlan, written: ModelSource, *, quant: bool
) -> tuple[float, float]:
    """Compare the model that transformers loads from ``target`` with the checkpoint ``written``, tensor by tensor and in logits.

    Args:
        written: The cut in float32, from which the file was made.
        quant: Whether other tensors than those of the cut were quantised again.

    Returns:
        max|difference| / max|logits|, and the mean Kullback-Leibler divergence in nats per token.

    Raises:
        CheckError: transformers cannot load the file, finds other numbers, or computes what quantising does not explain.
        NotCheckedError: The memory does not suffice.
    """
    import torch

    from chanfmt.models.gguf import load_gguf
    from chanfmt.models.quiet import quiet_transformers
    from surgery.cut.computed import Computation
    from surgery.cut.inputs import check_inputs

    check_memory(4 * _LOADED * written.index.parameters, "the model of the GGUF file in float32")
    try:
        model = load_gguf(target).eval()
    except ModelError as error:
        raise CheckError(f"the GGUF file does not load: {error.message}; nothing was written") from error
    changed = {part.tensor for item in layout.tensors if not item.copied for part in item.parts}
    _check_weights(model.state_dict(), written, changed, exact=not quant)
    inputs = check_inputs(model, plan.check_tokens, plan.seed)
    expected = Computation(written, torch.float32, lambda model: inputs).run(check_memory).output
    with torch.inference_mode(), quiet_transformers():
        logits = inputs.run(model)[0]
    scale = float(expected.abs().max())
    difference = float((logits - expected).abs().max()) / scale if scale else float(logits.abs().max())
    first, second = (values.double().log_softmax(-1) for values in (expected, logits))
    divergence = float((first.exp() * (first - second)).sum(-1).mean())
    if not math.isfinite(difference) or (not changed and not quant and difference > LOGIT_TOLERANCE):
        raise CheckError(f"the GGUF file's logits differ by {difference:.2g} of their largest value; nothing was written")
    return difference, max(0.0, divergence)


def _check_weights(state: Mapping[str, torch.Tensor], written: ModelSource, changed: set[str], *, exact: bool) -> None:
    """Compare the loaded weights with those of the cut: equal if their bytes were copied, otherwise about equal."""
    from surgery.cut.gguf.stored import float_rows

    for name, entry in written.index.tensors.items():
        # Weights of experts have other names once they are loaded; the logits show them.
        if name not in state:
            continue
        found = state[name].numpy()
        if found.shape != entry.shape or entry.dtype != "F32":
            raise CheckError(f"transformers finds {name} of the GGUF file in another shape than planned; nothing was written")
        expected = float_rows(entry, 0, math.prod(entry.shape[:-1])).reshape(entry.shape)
        if exact and name not in changed:
            good = np.array_equal(found, expected)
        else:
            power = float(np.square(expected, dtype=np.float64).sum())
            good = float(np.square(found - expected, dtype=np.float64).sum()) <= _LARGEST_ERROR**2 * power
        if not good:
            raise CheckError(f"transformers finds other numbers in {name} of the GGUF file than planned; nothing was written")
