"""The cuts that a sweep compares, each planned once before any of them is measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.errors import UsageError
from surgery.experiments.columns import channels_sha256
from surgery.planning.grids import parse_names, parse_seeds, parse_shares
from surgery.planning.layouts import AUTO
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from surgery.planning.selectors import file_name
from surgery.planning.target import SYNTAX as TARGETS
from surgery.planning.target import parse_targets
from surgery.recovery.options import RECOVERIES, REFITS, BiasRecovery, Recovery, RecoveryOptions, Refit, plan_recovery

if TYPE_CHECKING:
    from chanfmt.format.reader import Atlas
    from surgery.planning.plan import PruningPlan

DENSE = "dense"
SEEDED = "random"
"""The method that depends on a seed."""
KEY = ("method", "protect", "sparsity_asked", "recover", "seed")
DEFAULT_GRID = "0.1:0.7:0.1"
"""Shares of channels that a sweep removes if nothing else is asked for."""
_PLAN = {item.name: item.metadata for item in dataclasses.fields(PlanOptions)}
_RECOVERY = {item.name: item.metadata for item in dataclasses.fields(RecoveryOptions)}
_DEFAULTS = RecoveryOptions()
_SHARED = ("allocation", "max_layer_sparsity", "layers", "stack", "multiple_of", "layout")
"""Options of a plan that all runs of a sweep have in common."""


@dataclass(frozen=True)
class SweepOptions:
    """Which cuts to compare."""

    methods: str = field(
        default="scar-prot,wanda,activation,magnitude,random",
        metadata={
            "help": "methods to compare, separated by commas",
            "metavar": "METHODS",
        },
    )
    sparsity: str | None = field(
        default=None,
        metadata={
            "help": f"shares to remove: FIRST:LAST:STEP, or numbers separated by commas (default: {DEFAULT_GRID})",
            "metavar": "GRID",
        },
    )
    to: str | None = field(
        default=None,
        metadata={
            "help": f"sizes in place of --sparsity, separated by commas: {TARGETS.replace('%', '%%')}",
            "metavar": "SIZES",
        },
    )
    protect: tuple[str, ...] = field(
        default=("none",),
        metadata={
            "help": "protection to run every method under, as --protect of surgery plan; repeat the option to compare several",
            "flag": "--protections",
            "formerly": "--protect",
            "metavar": "WHAT",
            "repeat": True,
        },
    )
    recover: str = field(
        default="none",
        metadata={
            "help": f"recoveries to compare, separated by commas: {', '.join(RECOVERIES)}",
            "metavar": "HOW",
        },
    )
    recover_text: tuple[str, ...] = field(default=(), metadata=_RECOVERY["recover_text"])
    recover_tokens: str = field(default=_DEFAULTS.recover_tokens, metadata=_RECOVERY["recover_tokens"])
    recover_steps: int | None = field(default=None, metadata=_RECOVERY["recover_steps"])
    seeds: str = field(default="0", metadata={"help": "seeds of the method random, such as 0,1,2 or 0-4", "metavar": "SEEDS"})
    allocation: str = field(default="uniform", metadata=_PLAN["allocation"])
    max_layer_sparsity: float | None = field(default=None, metadata=_PLAN["max_layer_sparsity"])
    layers: str | None = field(default=None, metadata=_PLAN["layers"])
    stack: tuple[str, ...] = field(default=(), metadata=_PLAN["stack"])
    multiple_of: int | None = field(default=None, metadata=_PLAN["multiple_of"])
    layout: str = field(default=AUTO, metadata=_PLAN["layout"])

    def shared(self) -> dict[str, Any]:
        """The options that all plans have in common, by the names of `PlanOptions`."""
        return {name: getattr(self, name) for name in _SHARED}


@dataclass(frozen=True)
class Run:
    """One cut of a sweep.

    Attributes:
        key: The values that identify its row, by the names in `KEY`.
        options: Options of its plan; None for the dense model.
        recovery: How to make up for the cut.
        channels_sha256: Digest of what the cut removes, see `surgery.experiments.columns.channels_sha256`; empty before the
            cut is planned.
    """

    key: dict[str, Any]
    options: PlanOptions | None
    recovery: RecoveryOptions = field(default_factory=RecoveryOptions)
    channels_sha256: str = ""


def runs_of(options: SweepOptions) -> tuple[Run, ...]:
    """The cuts of a sweep in order, not yet planned. The key of a cut with a size holds the size until its sparsity is known.

    Raises:
        UsageError: An option has no meaning.
    """
    methods, seeds = parse_names(options.methods), parse_seeds(options.seeds)
    recoveries = [_recovery(name, options) for name in parse_names(options.recover)]
    for recovery in recoveries:
        recovery.check()
    amounts = _amounts(options)
    if not methods:
        raise UsageError("--methods names no method", hint="write the names as in scar-prot,wanda")
    if options.recover_steps is not None and not any(recovery.recover == "distill" for recovery in recoveries):
        raise UsageError("--recover-steps has no effect without the recovery distill", hint="add distill to --recover")
    if not recoveries:
        raise UsageError("--recover names no recovery", hint="write the names as in none,lstsq")
    runs = []
    for method in methods:
        for protect in dict.fromkeys(options.protect):
            for asked, amount in amounts.items():
                for seed in seeds if method == SEEDED else (None,):
                    plan = PlanOptions(method=method, protect=(protect,), seed=seed or 0, **amount, **options.shared())
                    plan.check()
                    for recovery in recoveries:
                        # The directory of a protect file says nothing about what was protected.
                        values = (method, file_name(protect), asked, recovery.recover, seed)
                        runs.append(Run(dict(zip(KEY, values, strict=True)), plan, recovery))
    if len({tuple(run.key.values()) for run in runs}) < len(runs):
        raise UsageError(
            "two files of --protections have the same name, so their rows would look alike", hint="rename one of the files"
        )
    return tuple(runs)


def _amounts(options: SweepOptions) -> dict[float | str, dict[str, Any]]:
    """What is asked of the cuts, a sparsity or a size, to the fields of `PlanOptions` that say so."""
    if options.to is None:
        return {share: {"sparsity": share} for share in parse_shares(options.sparsity or DEFAULT_GRID, "--sparsity")}
    if options.sparsity is not None:
        raise UsageError("--sparsity and --to both say how much to remove", hint="leave out one of them")
    return {target.text: {"to": target.text} for target in parse_targets(options.to)}


def _recovery(name: str, options: SweepOptions) -> RecoveryOptions:
    text = options.recover_text if name in REFITS else ()
    steps = options.recover_steps if name == "distill" else None
    return RecoveryOptions(name, recover_text=text, recover_tokens=options.recover_tokens, recover_steps=steps)


def plan_runs(atlas: Atlas, options: SweepOptions) -> tuple[tuple[Run, ...], tuple[str, ...]]:
    """Plan every cut of a sweep, so that no cut fails after hours. Returns the runs, the dense model first, and warnings.

    Raises:
        UsageError: An option has no meaning, or a plan is not possible. The message names the cut.
        AtlasError: The atlas lacks what a method needs.
    """
    planned = [Run(dict(zip(KEY, (DENSE, "none", 0.0, "none", None), strict=True)), None, channels_sha256=channels_sha256({}))]
    warnings: dict[str, None] = {}
    for run in runs_of(options):
        assert run.options is not None
        try:
            plan = make_plan(atlas, run.options)
            recovery = plan_recovery(run.recovery, atlas, plan)
        except UsageError as error:
            what = f"{run.key['method']} at {_asked(run)} with {run.key['protect']} protected"
            raise UsageError(f"{what}: {error.message}", hint=error.hint) from None
        warnings |= dict.fromkeys(f"{run.key['method']}: {warning}" for warning in plan.warnings)
        # A file of --protections may have changed since a row was measured, so the digest is of the channels and not of the names.
        refit = run.recovery.spelled() if isinstance(recovery, Refit) else ""
        digest = channels_sha256(removed_of(atlas, plan), means_of(atlas, plan, recovery), refit)
        # A size came to a sparsity, which the rows name. Two sizes may come to the same one.
        found = dataclasses.replace(run.options, sparsity=plan.sparsity, to=None)
        done = Run(run.key | {"sparsity_asked": plan.sparsity}, found, run.recovery, digest)
        if done.key not in [other.key for other in planned]:
            planned.append(done)
    return tuple(planned), tuple(warnings)


def _asked(run: Run) -> str:
    asked = run.key["sparsity_asked"]
    return asked if isinstance(asked, str) else f"{asked:g}"


def means_of(atlas: Atlas, plan: PruningPlan, recovery: Recovery | None) -> dict[int, np.ndarray] | None:
    """Block index to the values that replace removed channels; None for 0. A bias of their mean output equals their mean in place."""
    if not isinstance(recovery, BiasRecovery):
        return None
    return {
        block.index: recovery.means[planned.name]
        for block, planned in zip(atlas.blocks, plan.blocks, strict=True)
        if planned.is_cut
    }


def removed_of(atlas: Atlas, plan: PruningPlan) -> dict[int, np.ndarray]:
    """Block index to a mask of the channels that ``plan`` removes, bool of `Block.shape`, for the FFNs that it cuts."""
    removed = {}
    for block, planned in zip(atlas.blocks, plan.blocks, strict=True):
        if planned.is_cut:
            mask = np.ones(block.shape, dtype=bool)
            np.put_along_axis(mask, planned.kept.astype(np.int64), False, axis=-1)
            removed[block.index] = mask
    return removed
