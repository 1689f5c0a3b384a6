"""The two steps of a recovery, before and after a cut is written: prepare it, and put it into the files."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from chanfmt.base.files import check_space
from chanfmt.base.narrate import progress_bar, say
from chanfmt.models.load import pick_device
from surgery.cut.check import FITTED_TOLERANCE, ROUNDED_TOLERANCE, NotCheckedError, check_fitted, check_logits
from surgery.cut.checkpoint.patch import as_stored, write_kept, write_vector
from surgery.cut.checkpoint.writer import output_bytes
from surgery.recovery.bias import BiasPlan, plan_biases
from surgery.recovery.distillation.run import distilled
from surgery.recovery.options import BiasRecovery, Recovery, RecoveryReport, Refit
from surgery.recovery.refit import FittedFFN, Refitted, refitted
from surgery.recovery.resume import PartialRefit, environment_of, kept_beside, request_of
from surgery.recovery.tokens import with_tokens
from surgery.recovery.workplace import Workplace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import numpy as np

    from chanfmt.format.records import TensorSlice
    from chanfmt.models.safetensors import CheckpointIndex
    from chanfmt.models.source import ModelSource
    from surgery.cut.config_width import Layout
    from surgery.planning.plan import BlockPlan, PruningPlan


class Prepared(Protocol):
    """A recovery that is ready to be put into the files of a cut.

    Attributes:
        plan, index, layout: The plan, the checkpoint that it cuts, and the layout of the result. They replace those that
            the recovery was prepared for.
    """

    @property
    def plan(self) -> PruningPlan: ...
    @property
    def index(self) -> CheckpointIndex: ...
    @property
    def layout(self) -> Layout: ...

    def put_in(self, written: ModelSource, *, verify: bool) -> RecoveryReport:
        """Change the weights in the files of ``written``, and check what stock code computes with them.

        Args:
            verify: Whether the result is compared with the dense model, if the recovery has no other model to compare it with.

        Raises:
            CheckError: The result computes something else than it should.
        """


@contextlib.contextmanager
def prepared(
    recovery: Recovery,
    plan: PruningPlan,
    layout: Layout,
    source: ModelSource,
    output: Path,
    dtype: str | None = None,
) -> Iterator[Prepared]:
    """Do the work of ``recovery`` for the cut that ``layout`` makes of ``source``. Its result lives as long as the context.

    A refit is saved beside ``output`` on the way. If the body fails, it stays there, and the next call continues from it.

    Args:
        output: Directory that the cut will be written to. Intermediate results that do not fit in memory lie beside it.
        dtype: Dtype of the floating tensors of the result; None if they stay as they are stored.

    Raises:
        ModelError: This recovery does not work for this kind of model.
        UsageError: Something lies where an unfinished refit is kept.
        ChanfmtError: Memory or disk space runs out.
    """
    if isinstance(recovery, BiasRecovery):
        yield _Biases(plan_biases(plan, layout, source.index, recovery.means), source, recovery.tokens, dtype)
        return
    # The refit may take long, and an error about disk space should come before it.
    directory, size = output.absolute().parent, output_bytes(source.index, layout.cuts, dtype)
    check_space(directory, size)
    drawn = with_tokens(recovery, source)
    device = pick_device(drawn.device)
    unfinished = PartialRefit(output, request_of(plan, source, drawn, device, dtype), environment_of(device), drawn.save_every)
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_beside(unfinished))
        work = refit_of(drawn)
        with progress_bar(0, "seq", "refitting") as bar:
            fitted = stack.enter_context(
                work(plan, source, drawn, Workplace(directory, bar.reset, bar.update, dtype, unfinished, size))
            )
        tolerance = FITTED_TOLERANCE if dtype is None else ROUNDED_TOLERANCE
        yield _Fitted(plan, source.index, layout, fitted, drawn, tolerance)


def help_recovery(recovery: Refit, plan: PruningPlan, source: ModelSource, output: Path, dtype: str | None = None) -> None:
    """Do the part that a process beside the first one has in the distillation ``recovery``. Nothing is written.

    The other arguments are those of `prepared`.

    Raises:
        ModelError, ChanfmtError: As `prepared`.
        LostProcessError: Another process died.
    """
    with distilled(plan, source, with_tokens(recovery, source), Workplace(output.absolute().parent, dtype=dtype)):
        pass


def refit_of(refit: Refit) -> Callable[..., contextlib.AbstractContextManager[Refitted]]:
    """The function that does ``refit``, with the arguments of `surgery.recovery.refit.refitted`."""
    return distilled if refit.method == "distill" else refitted


@dataclass(frozen=True, eq=False)
class _Fitted:
    plan: PruningPlan
    index: CheckpointIndex
    layout: Layout
    fitted: Refitted
    refit: Refit
    tolerance: float

    def put_in(self, written: ModelSource, *, verify: bool) -> RecoveryReport:
        for block in self.plan.blocks:
            if block.is_cut:
                found = self.fitted.fitted(block.name)
                for expert, items in enumerate(_items(block)):
                    self._write(written, items, block.kept_of(expert), found.expert(expert) if block.n_experts else found)
        assert self.refit.tokens is not None
        routed = any(block.n_experts for block in self.plan.blocks)
        error = _unless_too_large(lambda: check_fitted(written, self.fitted, self.tolerance, routed=routed))
        return RecoveryReport(self.refit.method, self.refit.tokens.size, self.fitted.layers, error, self.fitted.distillation)

    def _write(self, written: ModelSource, items: Mapping[str, TensorSlice], kept: np.ndarray, found: FittedFFN) -> None:
        """Put the weights of a dense FFN or of an expert into the files."""
        for role, values in ({"write": found.weight} | dict(found.reads)).items():
            item = items[role]
            # A matrix is written with its channels along the last axis.
            columns = values if role == "write" or values.ndim == 1 else values.T
            entry, cut = written.index.tensors[item.tensor], self.layout.cuts[item.tensor]
            write_kept(entry, cut, item.indices(kept), columns, item.index)
        if found.bias is not None:
            item = items["write_bias"]
            write_vector(written.index.tensors[item.tensor], item.index, found.bias)


@dataclass(frozen=True, eq=False)
class _Biases:
    biases: BiasPlan
    source: ModelSource
    tokens: int
    dtype: str | None

    @property
    def plan(self) -> PruningPlan:
        return self.biases.plan

    @property
    def index(self) -> CheckpointIndex:
        return self.biases.index

    @property
    def layout(self) -> Layout:
        return self.biases.layout

    def put_in(self, written: ModelSource, *, verify: bool) -> RecoveryReport:
        added = {}
        for name, item, value in self.biases.places():
            entry = written.index.tensors[item.tensor]
            stored, before = (
                as_stored(torch.from_numpy(values), entry.dtype) for values in (value, self.biases.before[name].copy())
            )
            write_vector(entry, item.index, stored)
            # The check sees the biases as they are stored. The dense model's own biases are rounded alike.
            added[name] = (stored.double() - before.double()).numpy()
        error = None
        if verify:
            error = _unless_too_large(
                lambda: check_logits(self.plan, self.source, written, added=added, rounded=self.dtype).relative_error
            )
        return RecoveryReport("bias", self.tokens, (), error)


def _items(block: BlockPlan) -> list[dict[str, TensorSlice]]:
    """Role to slice of each expert, or of the dense FFN. A plan lists each role once per expert, in the order of the experts."""
    found: list[dict[str, TensorSlice]] = [{} for _ in range(max(1, block.n_experts))]
    seen: Counter[str] = Counter()
    for item in block.tensors:
        found[seen[item.role]][item.role] = item
        seen[item.role] += 1
    return found


def _unless_too_large(check: Callable[[], float]) -> float | None:
    """The error that ``check`` finds; None, and a note, if the memory does not suffice for the check."""
    try:
        return check()
    except NotCheckedError as error:
        say(f"the logits after the recovery are not compared: {error.message}")
        return None
