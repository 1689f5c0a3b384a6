"""A recovery as the two steps that surround the writing of a cut: prepare it, put it into the files."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from chanfmt.base.files import check_space
from chanfmt.base.narrate import progress_bar
from surgery.cut.check import check_fitted, check_logits
from surgery.cut.checkpoint.patch import as_stored, write_kept, write_vector
from surgery.cut.checkpoint.writer import output_bytes
from surgery.recovery.bias import BiasPlan, plan_biases
from surgery.recovery.options import BiasRecovery, RecoveryReport, Refit
from surgery.recovery.refit import Refitted, refitted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chanfmt.models.safetensors import CheckpointIndex
    from chanfmt.models.source import ModelSource
    from surgery.cut.config_width import Layout
    from surgery.planning.plan import PruningPlan


class Prepared(Protocol):
    """A recovery that is ready to be put in.

    Attributes:
        plan, index, layout: What to write, the checkpoint it is cut from and how, in place of those it was prepared for.
    """

    @property
    def plan(self) -> PruningPlan: ...
    @property
    def index(self) -> CheckpointIndex: ...
    @property
    def layout(self) -> Layout: ...

    def put_in(self, written: CheckpointIndex, *, verify: bool) -> RecoveryReport:
        """Change the weights of ``written`` in its files, and check what stock code makes of it.

        Args:
            verify: Whether the dense model may be loaded for it.

        Raises:
            CheckError: The result computes something else than it should.
        """


@contextlib.contextmanager
def prepared(
    recovery: Refit | BiasRecovery, plan: PruningPlan, layout: Layout, source: ModelSource, directory: Path
) -> Iterator[Prepared]:
    """Do the work of ``recovery`` for the cut that ``layout`` makes of ``source``. What it made is kept in the context.

    Args:
        directory: Where the result will go, and what does not fit in memory.

    Raises:
        ModelError: The model is of a kind that this recovery cannot be done for.
        ChanfmtError: Memory or disk run out.
    """
    if isinstance(recovery, BiasRecovery):
        yield _Biases(plan_biases(plan, layout, source.index, recovery.means), recovery.tokens)
        return
    # It may take long: complain about the room for its result before it.
    check_space(directory, output_bytes(source.index, layout.cuts))
    with contextlib.ExitStack() as stack:
        with progress_bar(0, "seq", "refitting") as bar:
            fitted = stack.enter_context(
                refitted(plan, source, recovery, spool_directory=directory, begin=bar.reset, progress=bar.update)
            )
        yield _Fitted(plan, source.index, layout, fitted, recovery.tokens.size)


@dataclass(frozen=True, eq=False)
class _Fitted:
    plan: PruningPlan
    index: CheckpointIndex
    layout: Layout
    fitted: Refitted
    tokens: int

    def put_in(self, written: CheckpointIndex, *, verify: bool) -> RecoveryReport:
        for block in self.plan.blocks:
            if block.is_cut:
                items = {item.role: item for item in block.tensors}
                item, write = items["write"], self.fitted.fitted(block.name)
                write_kept(written.tensors[item.tensor], self.layout.cuts[item.tensor], item.indices(block.kept), write.weight)
                if write.bias is not None:
                    write_vector(written.tensors[items["write_bias"].tensor], items["write_bias"].index, write.bias)
        return RecoveryReport("lstsq", self.tokens, self.fitted.layers, check_fitted(written.directory, self.fitted))


@dataclass(frozen=True, eq=False)
class _Biases:
    biases: BiasPlan
    tokens: int

    @property
    def plan(self) -> PruningPlan:
        return self.biases.plan

    @property
    def index(self) -> CheckpointIndex:
        return self.biases.index

    @property
    def layout(self) -> Layout:
        return self.biases.layout

    def put_in(self, written: CheckpointIndex, *, verify: bool) -> RecoveryReport:
        for item, value in self.biases.places():
            entry = written.tensors[item.tensor]
            write_vector(entry, item.index, as_stored(torch.from_numpy(value), entry.dtype))
        error = None
        if verify:
            error = check_logits(self.plan, self.index.directory, written.directory, added=self.biases.added).relative_error
        return RecoveryReport("bias", self.tokens, (), error)
