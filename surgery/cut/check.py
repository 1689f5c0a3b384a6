"""Check a cut checkpoint before it is published: its shapes, and what it computes."""

from __future__ import annotations

import contextlib
import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import CheckError
from chanfmt.models.load import auto_class
from chanfmt.models.quiet import quiet_transformers
from surgery.cut.checkpoint.rounding import stored_dtype
from surgery.cut.matching import match_ffns
from surgery.cut.stock import meta_shapes, parse_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from chanfmt.models.find.intercept import Interceptor
    from chanfmt.models.safetensors import CheckpointIndex
    from chanfmt.models.source import ModelSource
    from surgery.cut.checkpoint.cuts import Cut
    from surgery.cut.config_width import Allowed
    from surgery.cut.inputs import Inputs
    from surgery.planning.plan import PruningPlan
    from surgery.recovery.refit import Refitted

LOGIT_TOLERANCE = 1e-4
"""Largest accepted max|difference| / max|masked dense logits|."""

FITTED_TOLERANCE = 2e-2
"""Largest accepted relative error of a refitted model, whose refit may have run in bfloat16."""


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
    shapes = meta_shapes(output.config_fields)
    for name in sorted(shapes.keys() | allowed.keys()):
        if shapes.get(name) not in allowed.get(name, ()):
            raise _wrong("stock model", name, shapes.get(name), " or ".join(map(str, allowed.get(name, ()))))
    return ShapeCheck(len(expected), len(allowed))


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
    so a wrong map fails here. Stock ``from_pretrained`` loads both models in float32, one after the other. A cut that
    ruins a model also makes it magnify rounding, and rounding differs between the two models because their sums have
    different lengths. A difference in float32 is therefore checked again in float64, if the model fits.

    Args:
        mask: False if ``output`` should compute what ``source`` computes without a mask.
        added: Name of an FFN to the vector that the result adds to the FFN's output, (outputs,).
        rounded: Name of the torch dtype that the weights of ``source`` are rounded to first; None for not at all.

    Raises:
        CheckError: The logits differ by more than `LOGIT_TOLERANCE`, keys are missing or not expected, or
            parameters that ``source`` ties are not tied in ``output``.
    """
    check = _compare_logits(plan, source, output, "float32", mask, added or {}, rounded)
    # Not "error > tolerance": a NaN must fail.
    if not check.relative_error <= LOGIT_TOLERANCE and memory_shortage(source.index.parameters, 8) is None:
        check = _compare_logits(plan, source, output, "float64", mask, added or {}, rounded)
    if not check.relative_error <= LOGIT_TOLERANCE:
        what = "the masked dense model's" if mask else "the pruned model's"
        raise CheckError(
            f"the result's logits differ from {what} by {check.relative_error:.2g} of their largest "
            f"value in {check.dtype}, and {LOGIT_TOLERANCE:g} is allowed; nothing was written"
        )
    return check


def _compare_logits(
    plan: PruningPlan,
    source: ModelSource,
    output: ModelSource,
    dtype: str,
    mask: bool,
    added: Mapping[str, np.ndarray],
    rounded: str | None,
) -> LogitCheck:
    from surgery.cut.inputs import check_inputs

    dense, report = _load(source, dtype)
    if rounded is not None:
        import torch

        for tensor in dense.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(getattr(torch, rounded)))
    inputs = check_inputs(dense, plan.check_tokens, plan.seed)
    with _masked(dense, plan, inputs, added) if mask else contextlib.nullcontext():
        expected = _logits(dense, inputs)
    ties = _ties(dense)
    del dense
    gc.collect()
    pruned, pruned_report = _load(output, dtype)
    for kind, keys in pruned_report.items():
        # Keys that the source's own checkpoint lacks or adds were not caused by the cut.
        new = keys - report[kind]
        if new:
            raise CheckError(f"the result loads with {kind.replace('_', ' ')}: {', '.join(sorted(new)[:3])}")
    if _ties(pruned) != ties:
        raise CheckError("parameters that the source ties are not tied in the result")
    found = _logits(pruned, inputs)
    scale = expected.abs().max()
    error = float((found - expected).abs().max() / scale) if scale > 0 else float(found.abs().max())
    return LogitCheck(error, LOGIT_TOLERANCE, inputs.count, inputs.text, dtype)


def check_fitted(output: ModelSource, fitted: Refitted) -> float:
    """Compare the logits of the refitted model ``output`` with the logits at the end of the refit.

    Returns:
        max|difference| / max|logits|.

    Raises:
        CheckError: They differ by more than `FITTED_TOLERANCE`, or stock transformers cannot load it.
    """
    import torch

    from chanfmt.models.run import run_text

    model, _ = _load(output, "float32")
    with torch.inference_mode(), quiet_transformers():
        found = run_text(model, fitted.ids)[0][0].float()
    error = float((found - fitted.logits).abs().max() / fitted.logits.abs().max())
    if not error <= FITTED_TOLERANCE:
        raise CheckError(
            f"the refitted model's logits differ from those at the end of the refit by {error:.2g} of their largest "
            f"value, and {FITTED_TOLERANCE:g} is allowed; nothing was written"
        )
    return error


def memory_shortage(parameters: int, bytes_each: int = 4) -> str | None:
    """The reason why `check_logits` does not fit in memory for a model of ``parameters``; None if it fits."""
    # The weights, and a quarter of their size for the pages read and the activations.
    needed = parameters * bytes_each * 5 // 4 + (512 << 20)
    available = available_memory()
    if needed <= available:
        return None
    return f"the dense model needs {needed / 1e9:.1f} GB in float{8 * bytes_each} and {available / 1e9:.1f} GB are available"


def available_memory() -> int:
    """Bytes that this process may still use: the free memory, or less if its control group limits it."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        available = int(lines["MemAvailable"].split()[0]) * 1024
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))


def _wrong(what: str, name: str, found: object, expected: object) -> CheckError:
    return CheckError(
        f"the {what} has {found or 'nothing'} for {name!r} and should have {expected or 'nothing'}; nothing was written"
    )


def _load(source: ModelSource, dtype: str) -> tuple[Any, dict[str, set[str]]]:
    import torch

    try:
        with quiet_transformers():
            model, info = auto_class(parse_config(source.config_fields)).from_pretrained(
                source.directory,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise CheckError(f"stock transformers cannot load {source.directory}: {error}") from error
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return model.eval(), {kind: {str(key) for key in info[kind]} for kind in kinds}


def _masked(model: Any, plan: PruningPlan, inputs: Inputs, added: Mapping[str, np.ndarray]) -> Interceptor:
    """Zero the write vectors of the channels that ``plan`` removes from ``model``.

    Returns:
        A context manager that adds ``added`` while it is entered.
    """
    import torch

    from chanfmt.models.find.intercept import Interceptor
    from chanfmt.models.matrices import matrix_of

    interceptor = Interceptor(model)

    for block, ffn in zip(plan.blocks, match_ffns(plan.blocks, inputs.find_ffns(model)), strict=True):
        if not block.is_cut:
            continue
        if ffn is None:
            raise CheckError(f"the model has no FFN {block.module} of {block.n_channels} channels, which the plan cuts")
        if ffn.mixed:
            raise CheckError(
                f"{block.module} computes numbers from all its channels (a norm, a threshold) between its projections, so "
                "the kept channels would compute something else than in the dense model with the others masked",
                hint="to cut this model anyway, add --no-verify, and evaluate the result",
            )
        for expert, member in enumerate(ffn.members):
            removed = torch.from_numpy(block.removed_of(expert)).long()
            matrix_of(model, member.write.matrix).data.index_fill_(1, removed, 0.0)
            if block.name in added:
                bias = torch.from_numpy(added[block.name]).to(model.dtype)
                interceptor.on(member.write.matrix, after=bias.add)
    return interceptor


def _logits(model: Any, inputs: Inputs) -> Any:
    import torch

    with torch.inference_mode(), quiet_transformers():
        return inputs.run(model)[0]


def _ties(model: Any) -> set[frozenset[str]]:
    """Groups of parameter names that share one storage."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(parameter.data_ptr(), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}
