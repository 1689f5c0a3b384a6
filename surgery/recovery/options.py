"""How the kept channels are refitted, and the outcome, as data. No torch, no model."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.choices import unknown
from chanfmt.base.errors import AtlasError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chanfmt.format.reader import Atlas
    from chanfmt.format.records import Block
    from surgery.planning.plan import PruningPlan

RECOVERIES = {
    "none": "the kept weights stay unchanged",
    "bias": "the mean output of the removed channels becomes a bias, as in FLAP",
    "lstsq": "write projections are refitted by least squares, block by block, on the atlas's calibration tokens",
}


@dataclass(frozen=True)
class RecoveryOptions:
    """Whether and how the kept channels are refitted."""

    recover: str = field(
        default="none",
        metadata={
            "help": "refit the kept channels, without gradients or labels: " + ", ".join(RECOVERIES),
            "metavar": "HOW",
        },
    )
    recover_device: str = field(
        default="auto",
        metadata={
            "help": "device of the refit: auto, cpu, cuda, cuda:1, ...",
            "metavar": "DEVICE",
        },
    )
    spool_limit: float = field(
        default=4.0,
        metadata={
            "help": "memory in GiB for hidden states of the refit; the rest goes to a file next to the output",
            "metavar": "GIB",
        },
    )

    def check(self) -> None:
        """Raise `UsageError` for a value outside its range."""
        if self.recover not in RECOVERIES:
            raise unknown("recovery", self.recover, RECOVERIES)
        if not 0 <= self.spool_limit < 2**33:
            raise UsageError(f"--spool-limit must be 0 or more GiB, not {self.spool_limit:g}")


NO_RECOVERY = RecoveryOptions()
"""The recovery unless another is asked for."""


@dataclass(frozen=True, eq=False)
class BiasRecovery:
    """A recovery by biases, to be done.

    Attributes:
        means: Name of every FFN that the plan cuts to the mean activations of its channels, float64 (channels,).
        tokens: Number of calibration tokens behind the means.
    """

    means: Mapping[str, np.ndarray]
    tokens: int


@dataclass(frozen=True, eq=False)
class Refit:
    """A recovery by least squares, to be done.

    Attributes:
        tokens: Calibration tokens, int32 (sequence, position).
        device: Device of the refit.
        spool_bytes: Bytes of hidden states that are kept in memory.
    """

    tokens: np.ndarray
    device: str
    spool_bytes: int


Recovery = BiasRecovery | Refit
"""A recovery that is ready to be done."""


@dataclass(frozen=True)
class LayerRecovery:
    """What a refit did to one FFN.

    Attributes:
        layer_index, module: The FFN.
        error_before, error_after: Squared distance between the outputs of the cut and the dense model's block on the
            calibration tokens, as a share of the squared output that the FFN has to produce; with the kept weights, and with
            the fitted weights.
        condition: Estimated condition number of the damped second moments; None if it is not finite.
        damping: The penalty on the distance from the kept weights, as a share of the mean squared activation.
    """

    layer_index: int
    module: str
    error_before: float
    error_after: float
    condition: float | None
    damping: float


@dataclass(frozen=True)
class RecoveryReport:
    """A recovery that was done.

    Attributes:
        method: A key of `RECOVERIES`.
        tokens: Number of calibration tokens of the fit.
        layers: One entry per FFN that was refitted, in model order; empty for ``bias``.
        logit_error: max|difference| / max|logits| between the written model and the refit (``lstsq``) or the masked dense
            model with the biases (``bias``); None if it was not measured.
    """

    method: str
    tokens: int
    layers: Sequence[LayerRecovery] = ()
    logit_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The object ``recovery`` of ``surgery.json``."""
        return asdict(self)

    def summary(self) -> str:
        """One line on the outcome, for people."""
        if not self.layers:
            return f"{self.method}: {RECOVERIES[self.method]}, over {self.tokens:,} tokens"
        before = statistics.median(layer.error_before for layer in self.layers)
        after = statistics.median(layer.error_after for layer in self.layers)
        return (
            f"{self.method} on {self.tokens:,} tokens: output error {before:.3g} to {after:.3g} "
            f"(median of {len(self.layers)} FFNs)"
        )


def plan_recovery(options: RecoveryOptions, atlas: Atlas, plan: PruningPlan) -> Recovery | None:
    """Prepare the recovery that ``options`` ask for from the tokens or sums of ``atlas``, the plan's atlas; None for none.

    Raises:
        UsageError: The recovery is unknown, or ``plan`` cuts an FFN that cannot be refitted.
        AtlasError: ``atlas`` is not the plan's, or holds no tokens or no sums.
    """
    options.check()
    if options.recover == "none":
        return None
    plan.check_atlas(atlas)
    experts = next((block for block in plan.blocks if block.is_cut and block.n_experts), None)
    if experts is not None:
        raise UsageError(
            f"--recover refits only dense FFNs, and {experts.module} has {experts.n_experts} routed experts",
            hint="leave out --recover, or cut only the dense FFNs with --stack NAME",
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
            hint="use the atlas as it was built from text, before atlas strip",
        )
    return Refit(tokens, options.recover_device, int(options.spool_limit * 2**30))


def _means(atlas: Atlas, block: Block) -> np.ndarray:
    stack = atlas.stacks[block.stack]
    tokens = float(stack.row("tokens", block.row))
    if not tokens:
        raise AtlasError(f"no calibration token reached {block.module}", hint="build the atlas on more text")
    return np.asarray(stack.row("sum_u", block.row), dtype=np.float64) / tokens
