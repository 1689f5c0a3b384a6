"""Check a cut checkpoint before it is published: its shapes, and what it computes."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chanfmt.base.errors import ChanfmtError, CheckError
from chanfmt.base.memory import available_memory
from chanfmt.models.classes import auto_class, shapes_only
from surgery.cut.checkpoint.rounding import stored_dtype
from surgery.cut.stock import Shapes, meta_shapes

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from chanfmt.models.safetensors import CheckpointIndex
    from chanfmt.models.source import ModelSource
    from surgery.cut.checkpoint.cuts import Cut
    from surgery.cut.computed import Mask
    from surgery.cut.config_width import Allowed
    from surgery.planning.plan import PruningPlan
    from surgery.recovery.refit import Refitted

LOGIT_TOLERANCE = 1e-4
"""Largest accepted max|difference| / max|masked dense logits|."""

FITTED_TOLERANCE = 1e-3
"""Largest accepted relative error of a refitted model. The refit ends in float32, as the check runs, but maybe on a GPU."""
ROUNDED_TOLERANCE = 5e-2
"""The same if all other weights are rounded after the refit, to a dtype that the result is asked to have."""
_BASE = 512 << 20
"""Bytes for activations, logits, and what a process holds anyway."""


@dataclass(frozen=True)
class ShapeCheck:
    """Check 1, passed: every tensor on disk and every parameter of the stock model has the planned shape."""

    tensors: int
    parameters: int


@dataclass(frozen=True)
class LogitCheck:
    """Check 2, passed: the cut model computes what the dense model computes with the removed channels masked.

    Attributes:
        relative_error: max|difference| / max|masked dense logits|.
        tolerance: Largest accepted relative error.
        count: Number of tokens compared, or of samples for other inputs.
        text: Kind of the inputs: ``calibration tokens``, ``random tokens``, ``random pixel_values``, ...
        dtype: ``float32``, or ``float64`` if rounding alone exceeded the tolerance in float32.
    """

    relative_error: float
    tolerance: float
    count: int
    text: str
    dtype: str


def check_shapes(
    index: CheckpointIndex, cuts: Mapping[str, Cut], allowed: Allowed, output: ModelSource, dtype: str | None = None
) -> ShapeCheck:
    """Compare the checkpoint ``output`` with the planned cut, on disk and as stock code sees it.

    Args:
        index: The uncut checkpoint.
        allowed: Shapes that the stock model may have after the cut, by parameter name.
        dtype: Dtype of floating tensors in ``output``; None if they have those of ``index``.

    Raises:
        CheckError: A tensor or a parameter is missing, is not expected, or has another shape or dtype.
    """
    expected = {
        name: (stored_dtype(entry, dtype), cuts[name].shape if name in cuts else entry.shape)
        for name, entry in index.tensors.items()
    }
    for name in sorted(output.index.tensors.keys() | expected.keys()):
        entry = output.index.tensors.get(name)
        found = (entry.dtype, entry.shape) if entry else None
        if found != expected.get(name):
            raise _wrong("checkpoint", name, found, expected.get(name))
    shapes = _shapes_as_loaded(output)
    for name in sorted(shapes.keys() | allowed.keys()):
        if shapes.get(name) not in allowed.get(name, ()):
            raise _wrong("stock model", name, shapes.get(name), " or ".join(map(str, allowed.get(name, ()))))
    return ShapeCheck(len(expected), len(allowed))


def _shapes_as_loaded(output: ModelSource) -> Shapes:
    """Shapes of the model that ``output`` is for stock code, or for the modelling file beside it, as a user loads it."""
    if not output.trust_remote_code:
        return meta_shapes(output.config_fields)
    model = shapes_only(auto_class(output.config), output.config, trust_remote_code=True)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class NotCheckedError(ChanfmtError):
    """A check needs more memory than there is."""


def check_logits(
    plan: PruningPlan,
    source: ModelSource,
    output: ModelSource,
    *,
    mask: bool = True,
    added: Mapping[str, np.ndarray] | None = None,
    rounded: str | None = None,
) -> LogitCheck:
    """Compare the logits of ``output`` with those of ``source`` with the removed channels masked.

    Tracing the model shows where its FFNs lie, and the channels are masked there. The plan's tensor map is not used,
    so a wrong map fails here. Stock code runs both models in float32, one after the other, with one block in memory. If
    the model's class does not run block by block, stock ``from_pretrained`` loads it whole. A cut that ruins a model also
    makes it magnify rounding, and rounding differs between the two models because their sums have different lengths. A
    difference in float32 is therefore checked again in float64, if the memory suffices.

    Args:
        mask: False if ``output`` should compute what ``source`` computes without a mask.
        added: Name of an FFN to the vector that the result adds to the FFN's output, (outputs,).
        rounded: Name of the torch dtype that the weights of ``source`` are rounded to first; None for not at all.

    Raises:
        CheckError: The logits differ by more than `LOGIT_TOLERANCE`, keys are missing or not expected, or
            parameters that ``source`` ties are not tied in ``output``.
        NotCheckedError: The memory does not suffice. The message says what the check needs.
    """
    from surgery.cut.computed import Mask

    kept = Mask(plan.blocks, added or {}) if mask else None
    check = _compare_logits(plan, source, output, "float32", kept, rounded)
    # Not "error > tolerance": a NaN must fail.
    if not check.relative_error <= LOGIT_TOLERANCE:
        with contextlib.suppress(NotCheckedError):
            check = _compare_logits(plan, source, output, "float64", kept, rounded)
    if not check.relative_error <= LOGIT_TOLERANCE:
        what = "the masked dense model's" if mask else "the pruned model's"
        raise CheckError(
            f"the result's logits differ from {what} by {check.relative_error:.2g} of their largest "
            f"value in {check.dtype}, and {LOGIT_TOLERANCE:g} is allowed; nothing was written"
        )
    return check


def _compare_logits(
    plan: PruningPlan, source: ModelSource, output: ModelSource, dtype: str, mask: Mask | None, rounded: str | None
) -> LogitCheck:
    import torch

    from surgery.cut.computed import Computation
    from surgery.cut.inputs import check_inputs

    kind = getattr(torch, dtype)
    dense = Computation(
        source,
        kind,
        lambda model: check_inputs(model, plan.check_tokens, plan.seed),
        mask=mask,
        rounded=getattr(torch, rounded) if rounded else None,
    ).run(check_memory)
    gc.collect()
    inputs = dense.inputs
    pruned = Computation(output, kind, lambda model: inputs).run(check_memory)
    for keys, names in pruned.keys.items():
        # Keys that the source's own checkpoint lacks or adds were not caused by the cut.
        new = names - dense.keys.get(keys, set())
        if new:
            raise CheckError(f"the result loads with {keys.replace('_', ' ')}: {', '.join(sorted(new)[:3])}")
    if pruned.ties != dense.ties:
        raise CheckError("parameters that the source ties are not tied in the result")
    scale = dense.output.abs().max()
    error = float((pruned.output - dense.output).abs().max() / scale) if scale > 0 else float(pruned.output.abs().max())
    return LogitCheck(error, LOGIT_TOLERANCE, inputs.count, inputs.text, dtype)


def check_fitted(output: ModelSource, fitted: Refitted, tolerance: float = FITTED_TOLERANCE, *, routed: bool = False) -> float:
    """Compare the logits of the refitted model ``output`` with the logits at the end of the refit.

    Args:
        routed: Whether the model has routed experts. A router may then send a token to another expert because of rounding, so
            it is enough that most tokens agree.

    Returns:
        max|difference| / max|logits|. If some tokens of a model with routed experts differ by more than ``tolerance``, the
        median over the tokens of max|difference|, divided by the same number.

    Raises:
        CheckError: They differ by more than ``tolerance``, or stock transformers cannot load it.
        NotCheckedError: The memory does not suffice.
    """
    import torch

    from surgery.cut.computed import Computation
    from surgery.cut.inputs import Inputs

    inputs = Inputs({"input_ids": fitted.ids}, fitted.ids.numel(), "calibration tokens")
    found = Computation(output, torch.float32, lambda model: inputs).run(check_memory).output[0]
    errors = (found - fitted.logits).abs().amax(-1) / fitted.logits.abs().max()
    error = float(errors.max())
    if routed and error > tolerance:
        error = float(errors.median())
    if not error <= tolerance:
        raise CheckError(
            f"the refitted model's logits differ from those at the end of the refit by {error:.2g} of their largest "
            f"value, and {tolerance:g} is allowed; nothing was written"
        )
    return error


def check_memory(needed: int, what: str) -> None:
    """Raise `NotCheckedError` if ``needed`` bytes for ``what``, and some for everything else, are not available."""
    needed += _BASE
    available = available_memory()
    if needed > available:
        raise NotCheckedError(
            f"the check needs {needed / 1e9:.1f} GB of memory for {what}, and {available / 1e9:.1f} GB are available"
        )


def _wrong(what: str, name: str, found: object, expected: object) -> CheckError:
    return CheckError(
        f"the {what} has {found or 'nothing'} for {name!r} and should have {expected or 'nothing'}; nothing was written"
    )
