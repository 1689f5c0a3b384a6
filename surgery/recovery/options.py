"""How what survived a cut is refitted, and what that gave, as data. No torch, no model."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.errors import AtlasError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chanfmt.format.reader import Atlas
    from chanfmt.format.records import Block
    from surgery.planning.plan import PruningPlan

RECOVERIES = {
    "none": "what was kept stays as it was",
    "bias": "what the removed channels wrote on average becomes a bias, as in FLAP",
    "lstsq": "write projections are refitted by least squares, block by block, on the atlas's calibration tokens",
}


@dataclass(frozen=True)
class RecoveryOptions:
    """Whether and where to refit what was kept."""

    recover: str = field(
        default="none",
        metadata={
            "help": "refit what was kept, without gradients or labels: " + ", ".join(RECOVERIES),
            "metavar": "HOW",
        },
    )
    recover_device: str = field(
        default="auto",
        metadata={
            "help": "where the refit runs: auto, cpu, cuda, cuda:1, ...",
            "metavar": "DEVICE",
        },
    )
    spool_limit: float = field(
        default=4.0,
        metadata={
            "help": "GiB of hidden states that the refit keeps in memory; more lie on disk beside the output",
            "metavar": "GIB",
        },
    )

    def check(self) -> None:
        """Raise `UsageError` for a value that cannot be."""
        if self.recover not in RECOVERIES:
            raise UsageError(f"there is no --recover {self.recover!r}", hint=f"one of: {', '.join(RECOVERIES)}")
        if not 0 <= self.spool_limit < 2**33:
            raise UsageError(f"--spool-limit must be 0 or more GiB, not {self.spool_limit:g}")


NO_RECOVERY = RecoveryOptions()
"""The recovery unless another is asked for."""


@dataclass(frozen=True, eq=False)
class BiasRecovery:
    """Means to be added.

    Attributes:
        means: Name of every FFN of the plan to the mean activations of its channels, float64.
        tokens: Calibration tokens they were taken over.
    """

    means: Mapping[str, np.ndarray]
    tokens: int


@dataclass(frozen=True, eq=False)
class Refit:
    """A refit by least squares to be done.

    Attributes:
        tokens: Calibration text, int32 (sequence, position).
        device: Where it runs.
        spool_bytes: Bytes of hidden states kept in memory.
    """

    tokens: np.ndarray
    device: str
    spool_bytes: int


@dataclass(frozen=True)
class LayerRecovery:
    """What a refit did to one FFN.

    Attributes:
        layer_index, module: Which.
        error_before, error_after: Squared distance of the block's output from the dense model's, as a share of what the
            FFN has to make up, with the weights that were kept and with the fitted ones; on the calibration tokens.
        condition: Estimated condition number of the damped second moments; None where it is not finite.
        damping: The penalty on leaving the old weights, as a share of the mean squared activation.
    """

    layer_index: int
    module: str
    error_before: float
    error_after: float
    condition: float | None
    damping: float


@dataclass(frozen=True)
class RecoveryReport:
    """A refit that was done.

    Attributes:
        method: One of `RECOVERIES`.
        tokens: Calibration tokens it was fitted on.
        layers: One per FFN that was refitted, in model order; none for ``bias``.
        logit_error: Difference between the written model's logits and those of the refit, relative to the largest; None for
            ``bias``, which is part of the check of all logits.
    """

    method: str
    tokens: int
    layers: Sequence[LayerRecovery] = ()
    logit_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """What ``surgery.json`` says of it."""
        return asdict(self)

    def summary(self) -> str:
        """One line for people."""
        if not self.layers:
            return f"{self.method}: {RECOVERIES[self.method]}, over {self.tokens:,} tokens"
        before = statistics.median(layer.error_before for layer in self.layers)
        after = statistics.median(layer.error_after for layer in self.layers)
        return (
            f"{self.method} on {self.tokens:,} tokens: output error {before:.3g} to {after:.3g} "
            f"(median of {len(self.layers)} FFNs)"
        )


def plan_recovery(options: RecoveryOptions, atlas: Atlas, plan: PruningPlan) -> Refit | BiasRecovery | None:
    """The recovery that ``options`` ask for, on what ``atlas`` knows of its calibration tokens; None for none.

    Raises:
        UsageError: There is no such method, or ``plan`` cuts what cannot be refitted.
        AtlasError: ``atlas`` holds no tokens, or no sums.
    """
    options.check()
    if options.recover == "none":
        return None
    experts = next((block for block in plan.blocks if block.is_cut and block.n_experts), None)
    if experts is not None:
        raise UsageError(
            f"--recover refits dense FFNs, and {experts.module} has {experts.n_experts} routed experts",
            hint="cut without --recover, or only the dense FFNs: --stack NAME",
        )
    if options.recover == "bias":
        return BiasRecovery(
            {
                planned.name: _means(atlas, block)
                for block, planned in zip(atlas.blocks, plan.blocks, strict=True)
                if planned.is_cut
            },
            atlas.calibration.tokens,
        )
    tokens = atlas.calibration.token_ids
    if tokens is None or not len(tokens):
        raise AtlasError(
            f"{atlas.path} holds no calibration tokens, which --recover fits on",
            hint="use the atlas as it was built, not one that was stripped or made on arrays",
        )
    return Refit(tokens, options.recover_device, int(options.spool_limit * 2**30))


def _means(atlas: Atlas, block: Block) -> np.ndarray:
    stack = atlas.stacks[block.stack]
    tokens = float(stack.row("tokens", block.row))
    if not tokens:
        raise AtlasError(f"no calibration token reached {block.module}", hint="build the atlas on more text")
    return np.asarray(stack.row("sum_u", block.row), dtype=np.float64) / tokens
